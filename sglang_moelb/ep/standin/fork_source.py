"""Imported in the process that the others of a server are forked from, and only there of use.

It ends with the server's main process, and the others with it, as they ask of Linux. Without this
they would outlive a main process that is killed, and keep the source alive.
"""

from __future__ import annotations

import sys

from sglang.srt.utils.common import kill_itself_when_parent_died

if any("multiprocessing.forkserver" in word for word in sys.orig_argv):
    kill_itself_when_parent_died()
