# What server-setup.sh and families-setup.sh have in common, read by them in the repository's root with $folder and $lock set: ends
# them where the folder is ready, else empties it. $state goes into folder/ready once it is whole.
state=$(cat "tests/$(basename "$0")" tests/setup-folder.sh "$lock" | sha256sum | cut -d ' ' -f 1)  # another state: made again
if [ -f "$folder/ready" ] && [ "$(cat "$folder/ready")" = "$state" ]; then
    touch "$folder/ready"
    exit 0
fi
rm -rf "$folder"
mkdir -p "$folder"

refuse() { # why it cannot be: the tests that need the folder are skipped, and say so
    echo "$1" | tee "$folder/why" >&2
    exit 0
}
