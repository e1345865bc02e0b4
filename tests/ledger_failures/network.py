"""Four network namespaces on one of two bridges: links that can be cut and mended. Needs root."""

import os
import subprocess


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Network:
    """Namespace `i` has address `<base>.<i+1>`; this process is on the first bridge as `<base>.254`."""

    def __init__(self, count):
        tag = f"{os.getpid() % 100_000:05d}"
        self.base = f"10.{64 + os.getpid() % 128}.{os.getpid() // 128 % 250 + 1}"
        self.spaces = [f"ml{tag}n{one}" for one in range(count)]
        self.links = [f"ml{tag}v{one}" for one in range(count)]
        self.bridges = (f"ml{tag}a", f"ml{tag}b")

    def __enter__(self):
        try:
            for bridge in self.bridges:
                ip("link", "add", bridge, "type", "bridge")
                ip("link", "set", bridge, "up")
            ip("address", "add", f"{self.base}.254/24", "dev", self.bridges[0])
            for number, (space, link) in enumerate(zip(self.spaces, self.links, strict=True)):
                ip("netns", "add", space)
                ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
                ip("link", "set", link, "master", self.bridges[0], "up")
                ip("-n", space, "address", "add", f"{self.base}.{number + 1}/24", "dev", "eth0")
                ip("-n", space, "link", "set", "eth0", "up")
                ip("-n", space, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for space in self.spaces:
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)
        for link in (*self.links, *self.bridges):
            subprocess.run(["ip", "link", "del", link], check=False, capture_output=True)

    def address(self, number):
        return f"{self.base}.{number + 1}:7100"

    def prefix(self, number):
        return ("ip", "netns", "exec", self.spaces[number])

    def cut_off(self, *numbers):
        """These are with each other, and away from everybody else."""
        for number, link in enumerate(self.links):
            ip("link", "set", link, "master", self.bridges[1 if number in numbers else 0])

    def mend(self):
        self.cut_off()
