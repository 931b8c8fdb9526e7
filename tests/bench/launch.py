"""Start one command, wait for it and print what it used as JSON.

Run as a script in a bare interpreter (`python -I -S launch.py COMMAND...`). Linux carries
a parent's peak RSS over into the child that it forks, so a command started from a
process with rich loaded would never seem to use less memory than that process. This
one imports next to nothing: the floor of what can be measured is about 10 MB.
"""

import json
import os
import sys
import time


def main() -> None:
    command = sys.argv[1:]
    # stdout carries the report, so the command's own goes nowhere.
    silence = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    start = time.perf_counter()
    pid = os.posix_spawnp(command[0], command, os.environ, file_actions=silence)
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - start
    report = {
        "exit_code": os.waitstatus_to_exitcode(status),
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        # The largest process among the command and those it waited for. Linux: KiB.
        "peak_rss_bytes": usage.ru_maxrss * 1024,
    }
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
