"""Shows the page's address, and opens it in the browser where there is one."""

import os
import platform
import shutil
import subprocess
import sys
import threading
import webbrowser
from collections.abc import Callable, Mapping
from pathlib import Path
from subprocess import DEVNULL

from library.base.atomic_files import write_whole
from library.base.terminal import print_line
from library.environment.torch_builds import read

FIRST_PAGE, OWNER_ALONE = "open.html", 0o600
WINDOWS_BROWSER = "explorer.exe"  # opens a file with the program that Windows has for it


def show(start: str, address: str, folder: Path, opens: bool) -> threading.Thread:
    """Print an address that has a token, and open it in the browser if `opens`. Return the thread that does.

    The address ends its line, so that terminals make it a link of its own.
    """
    print_line(f"{start}{address}")
    if tunnel := describe_tunnel(address, os.environ):
        print_line(tunnel)
    open_file = find_browser(os.environ) if opens else None
    page = None if open_file is None else write_first_page(folder, address)
    # Some browsers keep the call waiting until they are closed.
    thread = threading.Thread(target=open_file, args=(page,), daemon=True)
    thread.start()
    return thread


def write_first_page(folder: Path, address: str) -> Path:
    """Write a file that leads to the page, for the owner alone: the arguments of the process that opens a browser are
    read by all users of the machine."""
    path = folder / FIRST_PAGE
    write_whole(path, f'<meta http-equiv="refresh" content="0; url={address}">\n', OWNER_ALONE)
    return path


def describe_tunnel(address: str, environment: Mapping[str, str]) -> str:
    """Say how the browser of another computer gets here through SSH; "" where nobody uses that."""
    ends = environment.get("SSH_CONNECTION", "").split()
    host, _, port = address.partition("://")[2].partition("/")[0].rpartition(":")
    if len(ends) != 4 or host != "127.0.0.1":
        return ""
    command = f"ssh -N -L {port}:127.0.0.1:{port} {environment.get('USER', 'USER')}@{ends[2]}"
    return f"To open it on the computer that you sit at, leave this running there: {command}"


def find_browser(environment: Mapping[str, str], system: str = sys.platform) -> Callable[[Path], object] | None:
    """Return what opens a file in the user's browser; None without a screen, where Python would start a browser of text
    in this terminal."""
    if "microsoft" in platform.release().lower() and shutil.which(WINDOWS_BROWSER):
        return open_in_windows
    has_screen = any(environment.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))
    return (lambda page: webbrowser.open(page.as_uri())) if has_screen or system in ("win32", "darwin") else None


def open_in_windows(page: Path) -> None:
    """Open a file of WSL in the browser of Windows, whose name of it is another one."""
    if name := read(["wslpath", "-w", str(page)]).strip():
        subprocess.run([WINDOWS_BROWSER, name], stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL)
