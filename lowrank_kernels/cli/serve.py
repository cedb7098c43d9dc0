"""`lrk serve`: answer OpenAI-compatible requests with many adapters over one model, batched together."""

from __future__ import annotations

import argparse
import logging
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from . import arguments
from .train import DTYPES, add_base_argument, store_base

_OTHER_FILES = 128
"""Descriptors that are kept for what is no connection: adapters' files, libraries, logs."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("serve", help=__doc__, description=__doc__)
    parser.add_argument("--model", default="smollm2", help="'smollm2', or a folder that transformers wrote")
    parser.add_argument(
        "--adapters",
        type=arguments.folder,
        required=True,
        help="folder of adapters, all of which are loaded, or the folder of one",
    )
    parser.add_argument(
        "--state",
        type=arguments.state_file,
        help="file in which the loaded adapters are noted; if it is there, those are loaded, not all of --adapters",
    )
    listen = parser.add_argument_group("who may ask")
    listen.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1, this machine)")
    listen.add_argument("--port", type=arguments.port, default=8000, help="default 8000; 0: any that is free")
    listen.add_argument(
        "--api-key",
        type=arguments.api_key,
        action="append",
        default=[],
        help="that requests have to bring; may be given again (default: LRK_API_KEY, or none)",
    )
    listen.add_argument(
        "--allowed-host",
        type=arguments.host_name,
        action="append",
        default=[],
        help="name that requests may be for, beside localhost, --host and addresses; '*' for any; may be given again",
    )
    listen.add_argument(
        "--allowed-origin",
        type=arguments.origin,
        action="append",
        default=[],
        help="of other sites' pages that may ask, as https://example.com; '*' for any; may be given again",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--budget-mib", type=arguments.count, help="of adapters on the device (default: no limit)")
    limits.add_argument("--max-rows", type=arguments.count, default=16, help="rows that run together (default 16)")
    limits.add_argument("--max-queue", type=arguments.count, default=256, help="rows that may wait (default 256)")
    limits.add_argument(
        "--chunk-tokens", type=arguments.count, default=128, help="of prompts beside running rows (default 128)"
    )
    limits.add_argument("--cache-tokens", type=arguments.count, help="whose keys and values are kept, of all rows")
    limits.add_argument(
        "--max-length", type=arguments.count, help="tokens of prompt and completion (default: the model's)"
    )
    limits.add_argument("--max-body-kib", type=arguments.count, default=1024, help="of a request (default 1024)")
    limits.add_argument("--max-connections", type=arguments.count, default=512, help="default 512")
    limits.add_argument(
        "--head-seconds", type=arguments.number(above=0.0), default=10.0, help="for a request's head (default 10)"
    )
    limits.add_argument(
        "--body-seconds", type=arguments.number(above=0.0), default=30.0, help="for a request's body (default 30)"
    )
    limits.add_argument(
        "--grace", type=arguments.whole(0), default=60, help="seconds for running requests when it ends (default 60)"
    )
    parser.add_argument("--strict", action="store_true", help="refuse fields that are not known, not ignore them")
    parser.add_argument("--no-access-log", action="store_true", help="no line for each request")
    parser.add_argument("--device", type=arguments.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add_base_argument(parser)
    parser.add_argument("--dtype", choices=DTYPES, help="of the base model (default float32 on CPU, bfloat16 on GPU)")


def run(args: argparse.Namespace) -> int:
    try:
        from ..serving.server import Safety, State, create_app, is_adapter, load_all
        from ..serving.server.connections import run_server
    except ImportError as error:
        raise ValueError(f"lrk serve needs the extra: pip install 'lowrank_kernels[serve]' ({error})") from None
    from ..integrations.transformers import load_language_model
    from ..serving import AdapterBank, Engine

    if not args.api_key and (key := os.environ.get("LRK_API_KEY")):
        args.api_key = [_key_of_environment(key)]
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if args.max_connections > files - _OTHER_FILES:
        raise ValueError(
            f"--max-connections: expected at most {max(0, files - _OTHER_FILES)}, got {args.max_connections}; this "
            f"process may open {files} files (ulimit -n), of which {_OTHER_FILES} are kept for others"
        )
    if args.state is not None and is_adapter(args.adapters):
        raise ValueError("--state: needs a folder of adapters, and --adapters is one adapter's own")
    state = None if args.state is None else State(args.state)
    _log_to_stderr(access=not args.no_access_log)
    with arguments.bound_socket(args.host, args.port) as listener:
        dtype = DTYPES[args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")]
        print(f"loading {args.model} as {dtype} on {args.device}", file=sys.stderr)
        model, tokenizer = load_language_model(args.model, dtype, args.device)
        store_base(model, args.base)
        name = Path(args.model).name
        with AdapterBank(model, None if args.budget_mib is None else args.budget_mib << 20) as bank:
            engine = Engine(
                bank,
                tokenizer,
                max_rows=args.max_rows,
                chunk_tokens=args.chunk_tokens,
                max_queue=args.max_queue,
                max_length=args.max_length,
                cache_tokens=args.cache_tokens,
            )
            try:
                load = load_all if state is None else state.load
                for folder, reason in load(engine, args.adapters, name).items():
                    print(f"{folder} not loaded: {reason}", file=sys.stderr)
                if is_adapter(args.adapters):
                    print(f"{args.adapters} is one adapter's own folder: serving that", file=sys.stderr)
                print(f"{name} with {len(bank.names())} adapters, up to {args.max_rows} rows together", file=sys.stderr)
                safety = Safety(
                    hosts=["localhost", args.host, *args.allowed_host],
                    origins=args.allowed_origin,
                    keys=args.api_key,
                    max_body_bytes=args.max_body_kib << 10,
                    body_seconds=args.body_seconds,
                )
                app = create_app(engine, name, args.adapters, safety=safety, strict=args.strict, state=state)
                listener.listen(128)
                host, port = listener.getsockname()[:2]
                shown = f"[{host}]" if ":" in host else host
                print(f"listening on http://{shown}:{port}", file=sys.stderr, flush=True)
                run_server(
                    app,
                    engine,
                    listener,
                    max_connections=args.max_connections,
                    head_seconds=args.head_seconds,
                    grace=args.grace,
                )
            finally:
                engine.close(drain=False)
    if engine.failed is not None:
        print(f"lrk serve: the engine has failed: {engine.failed}", file=sys.stderr)
        return 1
    return 0


def _key_of_environment(key: str) -> str:
    try:
        return arguments.api_key(key)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"LRK_API_KEY: {error}") from None


def _log_to_stderr(*, access: bool) -> None:
    """The package's notes, and a line for each request."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("lowrank_kernels")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logging.getLogger("lowrank_kernels.access").setLevel(logging.INFO if access else logging.WARNING)
