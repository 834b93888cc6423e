#!/bin/sh
# Prints the name of a Debian 12 image to build the servers' images on.
#
# The public image where it is present or can be pulled, else one made here from Debian's own packages by mmdebstrap,
# which needs root (20 s, 170 MB). Exits with 3 if mmdebstrap is needed and missing.
set -eu

public=debian:bookworm-slim
homemade=registry-tests/base:bookworm

present() { docker image inspect "$1" >/dev/null 2>&1; }

if present "$public"; then
    echo "$public"
elif present "$homemade"; then
    echo "$homemade"
elif docker pull --quiet "$public" >/dev/null 2>&1; then
    echo "$public"
elif command -v mmdebstrap >/dev/null; then
    echo "$public cannot be pulled: making $homemade" >&2
    mmdebstrap --quiet --variant=apt --include=ca-certificates bookworm - | docker import - "$homemade" >/dev/null
    present "$homemade"
    echo "$homemade"
else
    echo "$public cannot be pulled, and mmdebstrap, which makes such an image, is missing: apt-get install mmdebstrap" >&2
    exit 3
fi
