#!/bin/sh
# Writes the two lists that the images install: every package with the hashes of its files, for the Python and
# the platform of the images. The hashes are those of the package index that answers: use one that you trust.
set -eu
cd "$(dirname "$0")/.."
command -v uv > /dev/null || {
    echo "error: uv is needed to resolve for another platform: pip install 'uv>=0.13,<0.14'" >&2
    exit 2
}
lock() {
    uv pip compile --quiet --upgrade --no-annotate --generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
        --custom-compile-command "sh cluster/lock.sh" --output-file "$2" "$1"
    echo "written: $2"
}
lock requirements.txt cluster/requirements.lock
lock cluster/mlflow/requirements.txt cluster/mlflow/requirements.lock
