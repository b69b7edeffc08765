"""What a bare GPU machine is asked for in a few minutes: the kit that it needs, and one command that runs it all."""
