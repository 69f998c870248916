"""`QAdapterLM`: the customised policy `softmax((q + alpha_0 log pi) / alpha_tilde)` as a model of lm-eval."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from fastqadapter.commands.adapters import base_of
from fastqadapter.commands.parsing import ArgumentError
from fastqadapter.lm_eval.arguments import adapters_of, check_hf_arguments, number
from fastqadapter.lm_eval.scoring import LogLikelihood, Request, batches, log_likelihoods
from fastqadapter.models import QAdapterModel
from fastqadapter.models.base import lm_head_of
from fastqadapter.ops.checks import check_alphas

logger = logging.getLogger(__name__)


class QAdapterLM(HFLM):
    """lm-eval's `hf`, with Q-Adapters on the base: generation and log-likelihood are those of the customised policy.

    Args:
        pretrained: folder or hub id of the base model; default: what the (first) adapter names. In Python also a
            `QAdapterModel`, whose active adapter is then measured.
        adapter: folder or hub id of a trained Q-Adapter; several as `A=WEIGHT+B=WEIGHT`, or a list.
        alpha_0, alpha_tilde: of the policy; default: those of the (first) adapter's config.
        weight: of the one adapter, any number; default 1, 0 with equal alphas is the base policy.
        force: run an adapter of another base model.
        device: default: the GPU where there is one.
        **kwargs: the arguments of `hf` that `fastqadapter.lm_eval.arguments` does not refuse.

    Raises:
        ArgumentError: a ValueError of one line, for everything that cannot be.
    """

    def __init__(
        self,
        pretrained: str | QAdapterModel | None = None,
        adapter: str | Sequence[str] | None = None,
        alpha_0: float | None = None,
        alpha_tilde: float | None = None,
        weight: float | None = None,
        force: bool = False,
        device: str | None = None,
        **kwargs: Any,
    ):
        check_hf_arguments(kwargs)
        alpha_0, alpha_tilde = number("alpha_0", alpha_0), number("alpha_tilde", alpha_tilde)
        weight = number("weight", weight)
        with _one_line():  # before the model is loaded
            check_alphas(1.0 if alpha_0 is None else alpha_0, 1.0 if alpha_tilde is None else alpha_tilde)
        self.force = force
        self.folders: dict[str, str] = {}
        if isinstance(pretrained, QAdapterModel):
            if adapter is not None:
                raise ArgumentError(f"adapter={adapter!r} beside a QAdapterModel, which has its own: leave it out")
            weights = {pretrained.active_adapter: 1.0 if weight is None else weight}
        else:
            self.folders, weights = adapters_of(adapter, weight)
            pretrained = _base_name(pretrained, next(iter(self.folders.values())))
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained=pretrained, device=device, **kwargs)
        with _one_line():
            self.dials = self.model.dials(alpha_0, alpha_tilde, weights)
            self.dials.mixture(lm_head_of(self.model.get_base_model()))  # raises where logits would overflow

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        """The base as `hf` loads it, with the adapters on it."""
        super()._create_model(*args, **kwargs)
        first, *others = self.folders
        with _one_line():
            model = QAdapterModel.from_pretrained(self.model, self.folders[first], first, force=self.force)
            for name in others:
                model.load_adapter(self.folders[name], name, force=self.force)
        self._model = model

    @property
    def policy(self) -> dict[str, Any]:
        """The dials, as `QAdapterModel` takes them."""
        return {
            "alpha_0": self.dials.alpha_0,
            "alpha_tilde": self.dials.alpha_tilde,
            "adapters": dict(self.dials.weights),
        }

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        return super()._model_generate(context, max_length, stop, **generation_kwargs, **self.policy)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits (B, L, V); lm-eval finds out with them how large a batch may be. In `prompt` mode the first token is
        the prompt."""
        with torch.no_grad():
            return self.model(input_ids=inps, logits_to_keep=inps.shape[1], **self.policy).logits

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],  # texts or None, token ids of context and continuation
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[LogLikelihood]:
        whole = [Request(index, tuple(each[1]), tuple(each[2])) for index, each in enumerate(requests)]
        kept = [request.truncated(self.max_length) for request in whole]
        shortened = sum(before.inputs > after.inputs for before, after in zip(whole, kept, strict=True))
        if shortened:
            logger.warning("%d of %d contexts lose their start: max_length=%d", shortened, len(kept), self.max_length)
        answers: dict[int, LogLikelihood] = {}
        bar = tqdm(total=len(kept), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        with bar:
            for batch in batches(kept, override_bs or self._rows(requests, kept)):
                for request, answer in zip(batch, log_likelihoods(self.model, self.dials, batch), strict=True):
                    answers[request.index] = answer
                    texts = requests[request.index][0]
                    if texts is not None:  # windows of a rolling log-likelihood have none
                        self.cache_hook.add_partial("loglikelihood", texts, answer)
                bar.update(len(batch))
        return [answers[index] for index in range(len(kept))]

    def _rows(self, requests: Sequence[Any], kept: Sequence[Request]) -> int:
        """Rows of a batch, tried on the longest request for batch_size=auto."""
        if self.batch_size != "auto" or not kept:
            return int(self.batch_size) if self.batch_size != "auto" else 1
        return self._detect_batch_size(requests, max(kept, key=lambda request: request.inputs).index)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside the results, with the dials as they are in the end."""
        weights = {name: float(weight) for name, weight in self.dials.weights.items()}
        own = {"adapter_folders": self.folders, "kv_mode": self.model.qadapter_config.kv_mode}
        return {**super().get_model_info(), **own, **self.policy, "adapters": weights}


def _base_name(pretrained: Any, folder: str) -> str:
    """The base model as named, or as the adapter names it."""
    if isinstance(pretrained, str):
        return pretrained
    if pretrained is not None:
        kind = type(pretrained).__name__
        raise ArgumentError(f"pretrained is a {kind}: give a folder, a hub id or a QAdapterModel")
    try:
        return base_of(folder)
    except ArgumentError as error:
        raise ArgumentError(str(error).replace("--model_name_or_path", "pretrained=FOLDER")) from None


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """The library's own ValueErrors as ArgumentErrors, which `python -m fastqadapter.lm_eval` prints in one line."""
    try:
        yield
    except ArgumentError:
        raise
    except ValueError as error:
        raise ArgumentError(" ".join(str(error).split())) from error
