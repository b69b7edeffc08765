"""The whole SAM 3 with its own encoder and with a file in its place: are the masks the same?"""
