"""`lrk serve`: answer OpenAI-compatible requests with many adapters over one model, batched together."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from . import arguments
from .train import DTYPES, add_base_argument, store_base


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("serve", help=__doc__, description=__doc__)
    parser.add_argument("--model", default="smollm2", help="'smollm2', or a folder that transformers wrote")
    parser.add_argument(
        "--adapters",
        type=arguments.folder,
        required=True,
        help="folder of adapters, all of which are loaded, or the folder of one",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1, this machine)")
    parser.add_argument("--port", type=arguments.port, default=8000, help="default 8000")
    parser.add_argument("--budget-mib", type=arguments.count, help="of adapters on the device (default: no limit)")
    parser.add_argument("--max-batch", type=arguments.count, default=16, help="rows that run together (default 16)")
    parser.add_argument("--wait-ms", type=arguments.number(), default=5.0, help="to wait for more rows (default 5)")
    parser.add_argument("--max-queue", type=arguments.count, default=256, help="rows that may wait (default 256)")
    parser.add_argument(
        "--max-length", type=arguments.count, help="tokens of prompt and completion (default: the model's)"
    )
    parser.add_argument("--max-body-kib", type=arguments.count, default=1024, help="of a request (default 1024)")
    parser.add_argument(
        "--grace", type=arguments.whole(0), default=60, help="seconds for running requests when it ends (default 60)"
    )
    parser.add_argument("--device", type=arguments.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add_base_argument(parser)
    parser.add_argument("--dtype", choices=DTYPES, help="of the base model (default float32 on CPU, bfloat16 on GPU)")


def run(args: argparse.Namespace) -> int:
    try:
        import uvicorn

        from ..serving.server import create_app, is_adapter, load_all
    except ImportError as error:
        raise ValueError(f"lrk serve needs the extra: pip install 'lowrank_kernels[serve]' ({error})") from None
    from ..integrations.transformers import load_language_model
    from ..serving import AdapterBank
    from ..serving.batcher import Batcher

    arguments.check_address(args.host, args.port)
    dtype = DTYPES[args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")]
    print(f"loading {args.model} as {dtype} on {args.device}", file=sys.stderr)
    model, tokenizer = load_language_model(args.model, dtype, args.device)
    store_base(model, args.base)
    name = Path(args.model).name
    with AdapterBank(model, None if args.budget_mib is None else args.budget_mib << 20) as bank:
        batcher = Batcher(
            bank,
            tokenizer,
            max_batch=args.max_batch,
            wait_seconds=args.wait_ms / 1000,
            max_queue=args.max_queue,
            max_length=args.max_length,
        )
        try:
            for folder, reason in load_all(batcher, args.adapters, name).items():
                print(f"{folder} not loaded: {reason}", file=sys.stderr)
            if is_adapter(args.adapters):
                print(f"{args.adapters} is one adapter's own folder: serving that", file=sys.stderr)
            print(f"{name} with {len(bank.names())} adapters, up to {args.max_batch} rows together", file=sys.stderr)
            app = create_app(batcher, name, args.adapters, max_body_bytes=args.max_body_kib << 10)
            uvicorn.run(app, host=args.host, port=args.port, log_level="warning", timeout_graceful_shutdown=args.grace)
        finally:
            batcher.close()
    return 0
