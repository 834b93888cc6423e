# Installs and builds what tests and benchmarks need. Sourced by scripts/test, scripts/bench and .ci/run.
# shellcheck shell=bash

say() { printf '\n== %s\n' "$*"; }

die() {
    echo "$0: $*" >&2
    exit "${status:-1}"
}

# Debian packages, by name.
install() {
    command -v apt-get >/dev/null || die "please install what Debian calls: $*"
    local as_root=()
    if [[ $(id -u) != 0 ]]; then
        command -v sudo >/dev/null || die "please install as root: apt-get install $*"
        as_root=(sudo)
    fi
    say "install $*"
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
}

engine_answers() { docker version >/dev/null 2>&1; }

# protoc, and the standard types that come in a package of their own.
protoc_works() {
    local folder works=no
    command -v protoc >/dev/null || return 1
    folder=$(mktemp -d)
    echo 'syntax = "proto3"; import "google/protobuf/duration.proto";' >"$folder/try.proto"
    if protoc --proto_path="$folder" --descriptor_set_out=/dev/null "$folder/try.proto" 2>/dev/null; then works=yes; fi
    rm -r "$folder"
    [[ $works == yes ]]
}

# The store's image. Its base is made by mmdebstrap where none can be pulled, which is not installed for nothing.
build_image() {
    local image=registry-tests/$1:bookworm build=registry-tests/images/build.sh failed=0
    docker image inspect "$image" >/dev/null 2>&1 && return
    say "build $image"
    "$build" "$1" || failed=$?
    if [[ $failed == 3 ]]; then
        install mmdebstrap
        failed=0
        "$build" "$1" || failed=$?
    fi
    [[ $failed == 0 ]] || die "cannot build $image; REGISTRY_TEST_SERVERS=processes does without"
}

# What servers of a store need: STORE PACKAGES FILE…, the files being programs or paths that the packages bring. Where
# only one launcher can run, the other's own tests are left out here, by name, and said to be: in the tests themselves,
# what cannot run fails.
prepare_servers() {
    local store=$1 packages=$2
    shift 2
    left_out=()
    case ${REGISTRY_TEST_SERVERS:-} in
        containers) engine_answers || die "REGISTRY_TEST_SERVERS=containers, but no Docker engine answers" ;;
        processes | '') are_there "$@" || install_server "$1" "$packages" ;;
        *) die "REGISTRY_TEST_SERVERS must be containers or processes" ;;
    esac
    if [[ ${REGISTRY_TEST_SERVERS:-} == containers ]]; then left_out+=(processes::); fi
    if [[ ${REGISTRY_TEST_SERVERS:-} != processes ]] && engine_answers; then
        build_image "$store"
    else
        left_out+=(containers:: containers_only::)
    fi
}

are_there() {
    local file
    for file in "$@"; do
        [[ -f $file ]] || command -v "$file" >/dev/null || return 1
    done
}

# Only the program is wanted, not the service of its name that Debian starts with it.
install_server() {
    # shellcheck disable=SC2086 # several packages
    install $2
    if command -v systemctl >/dev/null && systemctl is-active --quiet "$1" 2>/dev/null; then
        local as_root=()
        [[ $(id -u) == 0 ]] || as_root=(sudo)
        "${as_root[@]}" systemctl disable --now --quiet "$1"
    fi
}

# A store's servers, and what building its client needs.
prepare_etcd() {
    protoc_works || install protobuf-compiler libprotobuf-dev
    prepare_servers etcd etcd-server etcd
}

# The library alone: the package zookeeperd is a service.
prepare_zookeeper() {
    prepare_servers zookeeper 'libzookeeper-java default-jre-headless' java /usr/share/java/zookeeper.jar
}

prepare_redis() {
    prepare_servers redis redis-server redis-server
}

prepare_compiler() {
    command -v cc >/dev/null || install gcc libc6-dev
}
