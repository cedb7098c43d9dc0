"""The methods of `lrk train`, by name. docs/adding_a_method.md walks through a new row."""

from __future__ import annotations

import argparse

import lowrank_kernels as lk

from ..chain import cola, rac_lora, xgblora
from ..optim import BlockAdamW, LoRAPro, LoRARITE, factor_groups, lora_plus
from . import arguments
from .allocation import (
    GATES,
    MODULES,
    MOVES,
    PRUNING,
    VALIDATION,
    alora,
    gate_optimizer,
    gated,
    gated_with_shortcuts,
    hetero_lora,
    lora_prune,
    save_cut,
    sora,
)
from .deft import DENSITY, deft
from .factors import BOOSTING, FACTORS, GRADIENTS, LINKS, chained, from_gradients, layers, save_adapter, save_from_start
from .galore import PROJECTION, all_weights, galore
from .gmt import MASKS, masked, whole_weights
from .lamda import FREEZING, between_leading_vectors, freezing
from .method import Method, save_model
from .reversible import REVERSIBLE, reversible, save_reversible
from .side import SIDE_PATH, save_side_path, side_path
from .smt import BLOCK_BUDGET, BLOCKS, save_blocks, selected_blocks
from .svft import PLACES, between_singular_vectors, write_svft
from .velora import PROJECTIONS, projected, save_projected

METHODS = {
    "lora": Method(
        "a low-rank correction of each linear",
        prepare=layers(),
        save=save_adapter,
        options=(FACTORS,),
    ),
    "dora": Method(
        "LoRA, and a magnitude for each row of W",
        prepare=layers(lk.DoRAConfig),
        save=save_adapter,
        options=(FACTORS,),
    ),
    "rac-lora": Method(
        "a chain of merges, each followed by a B that trains beside a fresh random A",
        prepare=layers(train="b", init="orthonormal"),
        ride=chained(rac_lora),
        save=save_model,
        options=(FACTORS, LINKS),
        changes_base=True,
    ),
    "cola": Method(
        "a chain of merges, each followed by a fresh LoRA",
        prepare=layers(),
        ride=chained(cola),
        save=save_model,
        options=(FACTORS, LINKS),
        changes_base=True,
    ),
    "xgblora": Method(
        "a chain of merges, each followed by a fresh LoRA of rank 1 in a few layers",
        prepare=layers(),
        ride=chained(xgblora, share="layer_share", l2="factor_l2", rounds="max_links"),
        save=save_model,
        options=(FACTORS, LINKS, BOOSTING),
        defaults={"rank": 1, "steps_per_link": 10},
        learning_rate=1e-3,
        changes_base=True,
    ),
    "lora-ga": Method(
        "LoRA that starts from the gradient of W",
        prepare=from_gradients,
        learning_rate=2.5e-4,
        save=save_from_start,
        options=(FACTORS, GRADIENTS),
        changes_base=True,
    ),
    "lora-plus": Method(
        "LoRA with a higher rate for B",
        prepare=layers(),
        optimizer=lambda model, lr, args: lora_plus(model, lr),
        learning_rate=5e-4,
        save=save_adapter,
        options=(FACTORS,),
    ),
    "lora-pro": Method(
        "LoRA whose step is nearest to that of full fine-tuning",
        prepare=layers(),
        optimizer=lambda model, lr, args: LoRAPro(factor_groups(model), lr=lr),
        learning_rate=3.90625e-5,
        save=save_adapter,
        options=(FACTORS,),
    ),
    "lora-rite": Method(
        "LoRA whose step does not depend on how B A is factored",
        prepare=layers(),
        optimizer=lambda model, lr, args: LoRARITE(factor_groups(model), lr=lr),
        learning_rate=1.25e-4,
        save=save_adapter,
        options=(FACTORS,),
    ),
    "sora": Method(
        "LoRA whose ranks have gates, which a penalty sets to zero",
        prepare=gated,
        optimizer=gate_optimizer,
        ride=sora,
        save=save_adapter,
        options=(FACTORS, GATES),
    ),
    "alora": Method(
        "LoRA whose ranks move to the layers that validation data needs them in",
        prepare=gated,
        ride=alora,
        save=save_adapter,
        options=(FACTORS, MOVES, VALIDATION),
        defaults={"rank": 4},
    ),
    "heterolora": Method(
        "LoRA in the modules with the best scores",
        prepare=gated_with_shortcuts,
        ride=hetero_lora,
        save=save_adapter,
        options=(FACTORS, MODULES, VALIDATION),
    ),
    "lamda": Method(
        "a small square matrix that trains between the leading singular vectors of W",
        prepare=between_leading_vectors,
        ride=freezing,
        save=save_adapter,
        options=(FACTORS, FREEZING),
        learning_rate=1e-4,
        defaults={"rank": 32},
    ),
    "loraprune": Method(
        "LoRA that masks, then cuts, the heads and channels its gradients find unimportant",
        prepare=layers(),
        ride=lora_prune,
        save=save_cut,
        options=(FACTORS, PRUNING),
        changes_base=True,
    ),
    "galore": Method(
        "full weights, Adam in the leading directions of each gradient",
        prepare=all_weights,
        optimizer=galore,
        learning_rate=8e-4,
        save=save_model,
        options=(PROJECTION,),
    ),
    "gmt": Method(
        "full weights, of which each step moves those with the largest gradients",
        prepare=whole_weights,
        ride=masked,
        learning_rate=1e-4,
        save=save_model,
        options=(MASKS,),
    ),
    "svft": Method(
        "a sparse matrix between the singular vectors of W",
        prepare=between_singular_vectors,
        learning_rate=3e-3,
        save=write_svft,
        options=(PLACES,),
    ),
    "velora": Method(
        "LoRA, or all weights, from one number of each sub-token in place of the saved activations",
        prepare=projected,
        save=save_projected,
        options=(FACTORS, PROJECTIONS),
    ),
    "meft": Method(
        "LoRA in reversible layers, whose activations are computed back from their outputs",
        prepare=reversible,
        save=save_reversible,
        options=(FACTORS, REVERSIBLE),
    ),
    "deft": Method(
        "LoRA with a term in the loss that empties the MLPs' activations",
        prepare=layers(),
        ride=deft,
        save=save_adapter,
        options=(FACTORS, DENSITY, VALIDATION),
    ),
    "sherl": Method(
        "LoRA in the last layers, and a side path from the frozen ones below, which have no backward",
        prepare=side_path,
        save=save_side_path,
        options=(FACTORS, SIDE_PATH),
    ),
    "smt": Method(
        "the blocks of W with the largest gradients",
        prepare=selected_blocks,
        optimizer=lambda model, lr, args: BlockAdamW(model, lr=lr),
        learning_rate=3e-4,
        save=save_blocks,
        options=(BLOCKS, BLOCK_BUDGET),
    ),
}


def leaves_base(method: str) -> bool:
    """Whether the base model's weights stay as they are, so that they may be stored in few bits."""
    row = METHODS[method]
    return not row.changes_base and any(group is FACTORS or group is PLACES for group in row.options)


def _takers(group: arguments.OptionGroup) -> list[str]:
    return [name for name, row in METHODS.items() if any(taken is group for taken in row.options)]


def ignored_options(method: str) -> list[str]:
    """The options of other methods that this one does not take."""
    every = {option: _takers(group) for row in METHODS.values() for group in row.options for option in group}
    return [option for option, takers in every.items() if method not in takers]


def add_options(parser: argparse.ArgumentParser, *groups: arguments.OptionGroup) -> None:
    """Add groups of options to a parser; ``{methods}`` in a help text becomes the methods that take the group."""
    for group in groups:
        for option, settings in group.items():
            words = settings["help"].replace("{methods}", ", ".join(_takers(group)))
            parser.add_argument(option, **{**settings, "help": words})


def add_method_arguments(parser: argparse.ArgumentParser, beside: tuple[arguments.OptionGroup, ...] = ()) -> None:
    """Add the options of every method, except for the groups that the parser has already."""
    groups = {id(group): group for row in METHODS.values() for group in row.options}
    have = {id(group) for group in beside}
    add_options(parser, *(group for key, group in groups.items() if key not in have))
