"""Collects the results of benchmarks/gpu/run.sh in one JSON. It runs after each part, so it does not import torch.

    python -m benchmarks.gpu.results keep OUT FOLDER STATUS SECONDS LOG     adds that folder's part to OUT/gpu.json
    python -m benchmarks.gpu.results summary OUT                            prints the last line

Last line: ``gpu card=… parts=… failed=… tokens_per_s_128=…``.
"""

import json
import sys
from pathlib import Path

from src.common.files import write_text


def keep(out: str, folder: str, status: str, seconds: str, log: str) -> int:
    """Keep a part's status ("0", another exit status, "no time"), the last line of its log, and its JSON if any."""
    path = Path(out, "gpu.json")
    known = json.loads(path.read_text()) if path.exists() else {}
    results = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("*.json"))]
    lines = Path(log).read_text(errors="replace").split("\n") if Path(log).exists() else []
    known[Path(folder).name] = {
        "status": status,
        "seconds": int(seconds),
        "last_line": next((line[:500] for line in reversed(lines) if line.strip()), ""),
        "results": results[0] if results else None,
    }
    write_text(path, json.dumps(known, indent=1) + "\n")
    return 0


def summary(out: str) -> int:
    """Print the last line; returns the exit status, 1 if a part failed."""
    known = json.loads(Path(out, "gpu.json").read_text())
    results = {name: part["results"] or {} for name, part in known.items()}
    failed = {name: part["status"] for name, part in known.items() if part["status"] != "0"}
    speeds: dict[int, float] = {}
    for row in results.get("curve", ()):
        speeds.setdefault(row["length"], row.get("tokens_per_s", 0.0))  # the first row of each length
    for name, status in failed.items():
        print(f"FAILED: {name}: {status}")
    card = results.get("environment", {}).get("device", "unknown").replace(" ", "_")
    fields = [f"tokens_per_s_{length}={speed:.0f}" for length, speed in speeds.items()]
    print(" ".join(["gpu", f"card={card}", f"parts={len(known)}", f"failed={len(failed)}", *fields]))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit({"keep": keep, "summary": summary}[sys.argv[1]](*sys.argv[2:]))
