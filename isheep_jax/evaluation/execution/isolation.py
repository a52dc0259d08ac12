"""Runs before the supervisor: puts this process into namespaces of its own, then becomes the supervisor.

The new namespaces have no network, no other process and a file system of which only `/tmp` (in memory) can be written.
It holds the interpreter and the system's libraries, read-only; no home directory, no /proc, no /etc, no device but
/dev/null, /dev/zero and /dev/urandom. All of it vanishes with the last process.

Called with the limits as JSON. Prints {"error": why} where the system does not allow it.
"""

import ctypes
import json
import os
import signal
import sys

NEW_MOUNTS, NEW_CGROUPS, NEW_NAMES, NEW_IPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
NEW_USERS, NEW_PROCESSES, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
MS_READ_ONLY, MS_NO_SUID, MS_NO_DEVICES, MS_NO_EXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_NO_ACCESS_TIMES, MS_NO_DIRECTORY_TIMES, MS_BIND, MS_RECURSIVE = 1024, 2048, 4096, 16384
MS_PRIVATE, MS_RELATIVE_TIMES = 1 << 18, 1 << 21
UNMOUNT_DETACHED = 2
PR_SET_PDEATHSIG = 1
NOBODY = 65534
# Limits of the new namespaces, which the program cannot raise: of further namespaces, and of kinds of memory that
# outlive a process and count for none.
NONE_ALLOWED = ("user/max_user_namespaces", "kernel/shmmni", "kernel/msgmni", "fs/mqueue/queues_max")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
# Where interpreters keep what they need; /nix and /gnu hold the libraries of two distributions.
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache", "/nix/store", "/gnu/store")

libc = ctypes.CDLL(None, use_errno=True)


def call(name, *arguments):
    """Calls a function of the C library. Raises OSError where it fails."""
    arguments = [a.encode() if isinstance(a, str) else a for a in arguments]
    if getattr(libc, name)(*arguments) == -1:
        error = ctypes.get_errno()
        path = next((a.decode() for a in arguments if isinstance(a, bytes)), "")
        raise OSError(error, f"{name} {path}: {os.strerror(error)}")


def mount(source, target, kind, flags, options=None):
    call("mount", source, target, kind, ctypes.c_ulong(flags), options)


def map_users(pid):
    """Gives the process `pid` the users and groups of its new namespace.

    Of root, two: itself, and nobody for the program. Of anyone else only nobody, who is the same user outside.
    """
    both = os.getuid() == 0 and is_user(NOBODY)
    if not both:
        write(f"/proc/{pid}/setgroups", "deny")
    for file, own in (("uid_map", os.getuid()), ("gid_map", os.getgid())):
        write(f"/proc/{pid}/{file}", f"0 0 1\n{NOBODY} {NOBODY} 1" if both else f"{NOBODY} {own} 1")


def is_user(number):
    """Returns whether there is such a user here: a container may have few."""
    with open("/proc/self/uid_map") as file:
        ranges = [tuple(map(int, line.split())) for line in file]
    return any(first <= number < first + count for first, _, count in ranges)


def write(path, text):
    with open(path, "w") as file:
        file.write(text)


def new_root(limits):
    """Replaces the file system by a new one in memory."""
    mount(None, "/", None, MS_RECURSIVE | MS_PRIVATE)
    in_memory("/tmp", 1 << 20, "755")
    os.mkdir("/tmp/old")
    call("pivot_root", "/tmp", "/tmp/old")
    os.chdir("/")
    os.mkdir("/tmp")
    in_memory("/tmp", limits["disk"], "1777")
    for path in (*SYSTEM, sys.base_prefix, sys.base_exec_prefix, os.path.dirname(sys.executable), *DEVICES):
        show(path, path)
    show(os.path.dirname(os.path.abspath(__file__)), "/sandbox")
    call("umount2", "/old", UNMOUNT_DETACHED)
    os.rmdir("/old")
    mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_READ_ONLY | MS_NO_SUID | MS_NO_DEVICES)


def in_memory(path, size, mode):
    mount("tmpfs", path, "tmpfs", MS_NO_SUID | MS_NO_DEVICES, f"size={size},nr_inodes=4096,mode={mode}")


def show(path, target):
    """Lets a path of the old file system be read at `target` of the new one, if it is there and not yet shown."""
    old = "/old" + path
    if os.path.lexists(target) or not os.path.lexists(old):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(old):
        os.symlink(os.readlink(old), target)
        return
    if os.path.isdir(old):
        os.mkdir(target)
    else:
        write(target, "")
    mount(old, target, None, MS_BIND | MS_RECURSIVE)
    if path not in DEVICES:
        for point in mounts_at(target):
            read_only(point)


def mounts_at(target):
    """Returns the mount points at and below a directory of the new file system."""
    with open("/old/proc/self/mountinfo") as file:
        points = [line.split()[4].replace("\\040", " ") for line in file]
    return [point for point in points if (point + "/").startswith(target + "/")]


def read_only(point):
    # Flags of the original mount must be repeated: a user's namespace may not drop them.
    flags, kept = os.statvfs(point).f_flag, 0
    for there, flag in (
        (os.ST_NODEV, MS_NO_DEVICES),
        (os.ST_NOEXEC, MS_NO_EXEC),
        (os.ST_NOATIME, MS_NO_ACCESS_TIMES),
        (os.ST_NODIRATIME, MS_NO_DIRECTORY_TIMES),
        (os.ST_RELATIME, MS_RELATIVE_TIMES),
    ):
        kept |= flag if flags & there else 0
    mount(None, point, None, MS_REMOUNT | MS_BIND | MS_READ_ONLY | MS_NO_SUID | kept)


def enter(limits, map_me):
    """Enters the namespaces and becomes the supervisor as the first process in them.

    map_me: waits until another process, outside, has mapped the users of the new namespace.
    """
    call("unshare", NEW_USERS | NEW_MOUNTS | NEW_PROCESSES | NEW_NETWORK | NEW_IPC | NEW_NAMES | NEW_CGROUPS)
    map_me()
    # When its parent is killed, this process is; so is the first process of the namespace, and with it all others.
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for name in NONE_ALLOWED:
        try:
            write(f"/proc/sys/{name}", "0")
        except OSError:
            pass  # read-only in containers; a namespace inside this one gives no rights outside it
    new_root(limits)
    if os.fork():
        os.wait()
        return
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.execve(sys.executable, [sys.executable, "-I", "-S", "-B", "/sandbox/supervisor.py"], {})


def main(limits):
    os.umask(0o022)
    ready_reader, ready_writer = os.pipe()
    mapped_reader, mapped_writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(mapped_writer)

        def map_me():
            os.write(ready_writer, b"1")
            if not os.read(mapped_reader, 1):
                os._exit(1)  # the other process has said why

        enter(limits, map_me)
        return
    os.close(ready_writer)
    if os.read(ready_reader, 1):
        map_users(child)
        os.write(mapped_writer, b"1")
    os.waitpid(child, 0)


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except OSError as error:
        print(json.dumps({"error": error.strerror or str(error)}), flush=True)
    os._exit(0)
