#!/bin/sh
# Every path that a document names in backquotes exists.   usage: docs.sh FILE.md...
bad=0
for doc in "$@"; do
  for path in $(grep -o '`[A-Za-z0-9_./-]*`' "$doc" | tr -d '`' | grep -E '/|[.](h|cpp|md|sh|txt)$' | grep -vE '^/|[*]'); do
    dir=$(dirname "$doc")
    [ -e "$path" ] || [ -e "$dir/$path" ] || [ -e "$dir/${path%/}" ] || { echo "$doc: no such path: $path"; bad=1; }
  done
done
exit $bad
