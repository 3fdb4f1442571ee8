"""Runs the serving workloads against mxn or any OpenAI-compatible server; the same as `mxn bench`.

python benchmarks/serving.py                                     # mxn with the default model, quick workloads
python benchmarks/serving.py --workloads all --repetitions 5 --json out.json --markdown out.md
python benchmarks/serving.py --in-process --quantisation int8,fp32
python benchmarks/serving.py --own --url llama=http://127.0.0.1:8080/v1 --url vllm=http://127.0.0.1:8090/v1
"""

from __future__ import annotations

import sys
from pathlib import Path

from mxn.cli.main import main

if __name__ == "__main__":
    # transformers would take benchmarks/kernels.py for the package "kernels".
    sys.path[:] = [path for path in sys.path if path != str(Path(__file__).resolve().parent)]
    sys.argv.insert(1, "bench")
    main()
