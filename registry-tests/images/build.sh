#!/bin/sh
# Builds registry-tests/STORE:bookworm from STORE/Dockerfile: ./build.sh etcd
set -eu

store=${1:?"usage: build.sh STORE"}
cd "$(dirname "$0")"
base=$(./base.sh)
docker build --quiet --build-arg "BASE=$base" --tag "registry-tests/$store:bookworm" "$store"
