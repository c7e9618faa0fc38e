#!/bin/sh
# Opens a page in the browser to train from, with the first Python on this computer that runs this suite.
cd "$(dirname "$0")" || exit 1
for python in python3.12 python3.13 python3.11 python3.14 python3.10 python3 python; do
  if "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1; then
    "$python" tools/start.py page "$@"
    status=$?
    break
  fi
done
if [ -z "$status" ]; then
  message="This suite needs Python 3.10 to 3.14. Install one from https://www.python.org/downloads/ and start again."
  echo "$message" >&2
  if command -v osascript >/dev/null 2>&1; then
    osascript -e "display alert \"$message\"" >/dev/null 2>&1
  elif [ -n "$DISPLAY$WAYLAND_DISPLAY" ] && command -v zenity >/dev/null 2>&1; then
    zenity --error --text "$message" 2>/dev/null
  fi
  status=1
fi
# A window that closes at once shows no error.
if [ "$status" != 0 ] && [ "$status" != 130 ] && [ -t 0 ]; then
  printf 'Press Enter to close. '
  read -r _
fi
exit "$status"
