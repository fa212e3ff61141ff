"""Runs shipped studies and puts their results into docs/evidence: ``python docs/extensions/run_studies.py --scale tiny``."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from evidence import DATA, NEED_DATA, write_all

from ncalign.study.spec import shipped


def main(arguments: Sequence[str]) -> int:
    """Run the studies one after the other; those that were run already only go on where something is left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("studies", nargs="*", default=[], help="names; none: all")
    parser.add_argument("--scale", default="tiny")
    parser.add_argument("--seeds", help="of each arm; none: as the studies say")
    parser.add_argument("--workers", default="2")
    parser.add_argument("--data", help="file of programs, for transfer above tiny")
    parser.add_argument("--folder", type=Path, default=Path("runs/evidence"))
    given = parser.parse_args(arguments)
    failed, began = 0, time.monotonic()
    for name in given.studies or shipped():
        needs_data = (name, given.scale) in NEED_DATA
        if needs_data and given.data is None:
            print(f"{name}: left out, since it needs --data")
            continue
        folder = given.folder / f"{name}-{given.scale}"
        command = [sys.executable, "-m", "ncalign", "study", name, "--scale", given.scale, "--workers", given.workers]
        command += ["--output_dir", str(folder), *(["--seeds", given.seeds] if given.seeds else [])]
        command += ["--data", given.data] if needs_data else []
        since = time.monotonic()
        code = subprocess.run(command).returncode
        print(f"{name}: {(time.monotonic() - since) / 60:.1f} min{'' if code == 0 else f', exit code {code}'}", flush=True)
        failed += code != 0
        if (folder / "study.json").is_file():
            DATA.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / "study.json", DATA / f"{name}-{given.scale}.json")
            # At once: a stop costs nothing that is done.
            write_all()
    print(f"all: {(time.monotonic() - began) / 60:.1f} min")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
