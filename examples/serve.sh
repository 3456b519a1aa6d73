#!/usr/bin/env bash
# Generate an image with a running `fastface serve`: serve.sh PHOTO PROMPT OUTPUT
# FASTFACE_URL is the server's address, FASTFACE_TOKEN its token if it has one.
set -euo pipefail
photo=$1 prompt=$2 output=$3
url=${FASTFACE_URL:-http://127.0.0.1:8188}
call() { curl --silent --show-error --fail-with-body -H "Authorization: Bearer ${FASTFACE_TOKEN:-none}" "$@"; }
field() { python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"; }
# An identity is saved once; later runs need no photo.
call "$url/api/identities" -F name=me -F photos=@"$photo" >/dev/null
request=$(python3 -c 'import json, sys; print(json.dumps({"prompts": [sys.argv[1]], "identity": "me"}))' "$prompt")
run=$(call "$url/api/runs" -F "request=$request" | field id)
# The stream ends with the run.
call --no-buffer "$url/api/runs/$run/events" | grep '^event:'
call "$url/api/runs/$run/images/0" -o "$output"
echo "wrote $output"
