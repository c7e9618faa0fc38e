#!/bin/sh
# What macOS starts by a double-click.
exec "$(dirname "$0")/start.sh" "$@"
