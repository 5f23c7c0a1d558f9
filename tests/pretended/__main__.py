"""`python -m tests.pretended kdfast.train --teacher ...`: a program of kdfast on the device.

Prints what it counted: launches by operation, host reads and waits by place, copies, peak memory.
"""

import argparse
import importlib
import sys

from tests.pretended import build


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--capability", default="7.0", help="7.0, 8.0 or 9.0")
    parser.add_argument("--free_bytes", type=int, default=16 * 2**30)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("program", help="a module with a function main, such as kdfast.train")
    parser.add_argument("flags", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    build.load()
    from tests.pretended.device import pretended

    capability = tuple(map(int, given.capability.split(".")))
    with pretended(capability, given.free_bytes, devices=given.devices) as device:
        status = importlib.import_module(given.program).main(given.flags)
    print(f"{sum(device.launches.values())} launches")
    for counter in (device.launches, device.reads, device.waits, device.copies):
        print(*(f"  {count:7}  {what}" for what, count in counter.most_common(20)), sep="\n")
    print("peak bytes:", *(card.peak for card in device.cards))
    return status


if __name__ == "__main__":
    sys.exit(main())
