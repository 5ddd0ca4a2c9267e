"""
The inside of the fence that `fence.py` puts round a generated program. Started by it alone, as `python -I -S -B`.

It reads a request from standard input, gives up what the program must not have, runs the program's parts one after the
other in one namespace, and writes the request's token to standard output when all of them ended by themselves. The
program's own output goes nowhere.
"""

import json
import os
import stat
import sys


# What a program that only computes has no use for. Python reports each to an audit hook before it happens.
REFUSED = (
    *("socket.", "ctypes.", "subprocess.", "pty.", "ftplib.", "smtplib.", "urllib.", "http."),
    *("os.fork", "os.exec", "os.spawn", "os.posix_spawn", "os.system", "os.kill", "signal.pthread_kill"),
)
REFUSED_MODULES = ("_posixsubprocess", "_ctypes")  # they reach the system without telling the hook
CHANGES = (
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod"),
    *("os.chown", "os.lchown", "os.utime", "os.setxattr", "os.removexattr", "shutil."),
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
NOBODY = 65534


def main() -> None:
    request = json.load(sys.stdin)
    verdict, nowhere = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # the request, with its token, cannot be read again
        os.dup2(nowhere, stream)
    own_network = leave_network_and_rights()
    limit(request)
    no_children = cannot_fork()

    sys.addaudithook(make_hook(os.getcwd(), verdict))
    namespace = {"__name__": "__main__"}
    try:
        for source in request["sources"]:
            exec(compile(source, "<candidate>", "exec"), namespace)
    except BaseException as error:
        message = f"{type(error).__name__}: {error}"[:300]
    else:
        message = f"{request['token']} {int(own_network)} {int(no_children)}"
    os.write(verdict, message.encode("utf-8", "replace"))
    os._exit(0)  # nothing that the program left behind runs


def leave_network_and_rights() -> bool:
    """
    Go into a network of this process alone, become nobody if started by root, and die with the process outside.

    Limits on processes do not bind root, and owners of files do not either. Root stays root where nobody may read the
    standard library, in a home folder say; then Python alone keeps the program from processes and files.

    Returns:
        `bool`: whether the kernel gave the network.
    """
    new_user, new_network, die_with_parent = 0x10000000, 0x40000000, 1
    try:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        libc.unshare, libc.prctl  # noqa: B018 (Linux has them)
    except (ImportError, OSError, AttributeError):
        libc = None
    apart = libc is not None and libc.unshare(new_network) == 0
    if os.geteuid() == 0 and all_may_read(os.path.dirname(os.__file__)):
        os.chown(os.getcwd(), NOBODY, NOBODY)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    if libc is not None:
        # an ordinary user may have a network of his own only inside a user namespace of his own
        apart = apart or libc.unshare(new_user | new_network) == 0
        libc.prctl(die_with_parent, 9)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("ctypes", "_ctypes")]:
        del sys.modules[name]
    return apart


def all_may_read(folder: str) -> bool:
    """Say whether every user may read a folder."""
    while folder != os.path.dirname(folder):
        if not os.stat(folder).st_mode & stat.S_IXOTH:
            return False
        folder = os.path.dirname(folder)
    return True


def limit(request: dict) -> None:
    """Set the limits that the kernel keeps; a program cannot raise them again."""
    import resource

    for kind, most in (
        (resource.RLIMIT_CPU, request["cpu_seconds"]),
        (resource.RLIMIT_AS, request["memory_mb"] * 2**20),
        (resource.RLIMIT_FSIZE, 2**20),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(kind, (most, most))


def cannot_fork() -> bool:
    """Say whether the kernel lets this process start no other."""
    try:
        child = os.fork()
    except OSError:
        return True
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return False


def make_hook(folder: str, verdict: int):
    """Return an audit hook that ends the process where the program reaches out of `folder`."""
    write, leave, realpath, fspath = os.write, os._exit, os.path.realpath, os.fspath
    folder = realpath(folder)

    def refuse(event: str, detail: object) -> None:
        write(verdict, f"refused: {event} {detail}"[:300].encode("utf-8", "replace"))
        leave(1)

    def outside(path: object) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False
        place = fspath(path)
        place = realpath(place.decode("utf-8", "replace") if isinstance(place, bytes) else place)
        return place != folder and not place.startswith(folder + "/")

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            if (flags or 0) & WRITING and outside(path):
                refuse(event, path)
        elif event == "import":
            if args[0].partition(".")[0] in REFUSED_MODULES:
                refuse(event, args[0])
        elif event.startswith(REFUSED) or (event.startswith(CHANGES) and any(outside(path) for path in args)):
            refuse(event, "")

    return hook


if __name__ == "__main__":
    main()
