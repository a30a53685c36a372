"""compute-sanitizer over a handful of kernel tests on the GPU at hand: memcheck, then racecheck.

    python experiments/speed/sanitize.py                          the tests in TESTS
    python experiments/speed/sanitize.py --tool memcheck -- FILE -k NAME     others
    python experiments/speed/sanitize.py --out sanitizer.json                keep what was found

Every access of every kernel is checked, so shapes must be tiny; --jobs runs take place at a time,
each on a core that compiles. Allocations are not cached, else an access past a tensor would fall
into its neighbour unseen. Exits with 1 if a tool found an error or a test failed, with 2 where
there is no compute-sanitizer or no CUDA device.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# File under tests/unit -> which of its tests (pytest -k).
TESTS = {
    "test_triton_attention.py": (
        "(is_the_reference or lists_of_single_queries) and 63 and docs and kv"
        " or half_precision and 24 and float16 or single_keys_per_query and (20 or 63)"
        " or united_in_the_backward and 63 and float16"
    ),
    "test_fused_gate.py": "multiplies_the_output",
    "test_triton_decode.py": "decoding_is_the_reference",
    "test_triton_survivors.py": "is_that_of_the_definition and docs or lists_in_parts",
    "test_triton_select.py": "exact_scores_choose_the_same and docs or long_rows and sigmoid",
    "test_triton_filter.py": "same_choice and docs or splits-few-docs",
    "test_triton_statistics.py": "heads_apart or longer_cache",
    "test_query_gathering.py": "last_queries_only and docs or half_precision or runs_of",
    "test_gather_backward.py": "gradients_are or half_precision",
    "test_triton_indexer_loss.py": "dense_masses and docs or test_dense_kl and docs or 34",
    "test_scores_of_unions.py": "lengths and 63 or same",
}
OPTIONS = {
    "memcheck": ["--leak-check", "no"],
    "racecheck": ["--racecheck-report", "analysis"],
    "initcheck": [],
    "synccheck": [],
}
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tool", nargs="+", choices=list(OPTIONS))
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--out", type=Path, help="JSON file, written anew after each run")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, after --")
    args = parser.parse_args()
    search = os.pathsep.join([os.environ.get("PATH", ""), *PLACES])
    program = shutil.which("compute-sanitizer", path=search)
    if program is None:
        print("compute-sanitizer is not on the PATH: it comes with the CUDA toolkit")
        return 2
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device")
        return 2
    runs = [args.pytest] if args.pytest else [[str(_file(f)), "-k", k] for f, k in TESTS.items()]
    todo = [(tool, words) for tool in args.tool or ("memcheck", "racecheck") for words in runs]
    found: list[dict[str, object]] = []

    def job(of: tuple[str, list[str]]) -> None:
        found.append(check(program, *of))
        if args.out:
            args.out.write_text(json.dumps(report | {"records": found}, indent=1) + "\n")

    from gsa_kernels.bench.timing import environment

    report = environment(torch.device("cuda")) | {"command": " ".join(["python", *sys.argv])}
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(job, todo))
    failed = [f"{row['tool']}: {row['tests']}" for row in found if row["exit_code"]]
    print("\n".join(["FAILED", *failed]) if failed else "no errors")
    return 1 if failed else 0


def _file(name: str) -> Path:
    return ROOT / "tests" / "unit" / name


def check(program: str, tool: str, words: list[str]) -> dict[str, object]:
    """One run of pytest under one tool, once its output is printed. exit_code: of pytest; 99 if
    the tool found something."""
    command = [program, "--tool", tool, *OPTIONS[tool], "--error-exitcode", "99"]
    command += [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *words]
    environ = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        command, env=environ, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print("+ " + " ".join(command) + "\n" + done.stdout, flush=True)
    summary = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", done.stdout, re.MULTILINE)
    tests = re.findall(r"^(\d+ .*) in [\d.]+s", done.stdout, re.MULTILINE)
    return {
        "tool": tool,
        "tests": " ".join(words).replace(f"{ROOT}{os.sep}", ""),
        "result": tests[-1] if tests else "none ran",
        "summary": summary[-1] if summary else "none",
        "exit_code": done.returncode,
    }


if __name__ == "__main__":
    sys.exit(main())
