"""One rank's part of the native decoder: a stage's layers, a shard of each, and the ends where the stage has them.

Every rank of a stage holds all hidden features of a token, so norms and residuals are computed by all of them, and two
sums a layer join what their heads and feed-forward features gave (Megatron-LM, Shoeybi et al., 2019). The vocabulary is
cut over the shards of the first stage to embed and over those of the last to score.

Legend: T tokens of the step, D hidden size, R rows, V vocabulary, S the vocabulary's share of a shard.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import functional as F

from models.layers import MIN_ROWS, Linear, RMSNorm
from models.parallel import Place
from models.quantize import FLOAT, Quantization
from models.text.architecture import DenseArchitecture
from models.text.decoder import Decoder, DecoderLayer
from models.text.rope import RopeTable
from models.text.share import Share
from models.weights import Cut, Storage


class DecoderRank(Decoder):
    """What `place` computes. All ranks of a stage call `forward` and `logits` alike, with the same arguments."""

    is_capturable = False
    """Ranks meet within a forward."""

    def __init__(
        self,
        architecture: DenseArchitecture,
        place: Place,
        *,
        dtype: torch.dtype,
        device: torch.device,
        num_positions: int,
        quantization: Quantization = FLOAT,
    ):
        """Raises ModelError when the model cannot be cut into that many parts."""
        spec = architecture.spec
        share = Share.of(architecture, place)
        self.spec = replace(spec, dtype=dtype)
        whole = _whole(architecture, quantization)
        self._shapes = {name: storage.shape for name, storage in whole.items()}
        self.num_parameters = sum(storage.numel() for storage in whole.values())
        self.rank_spec = replace(
            self.spec, num_layers=len(share.layers), num_heads=len(share.heads), num_kv_heads=len(share.kv_heads)
        )
        self.architecture, self.device, self.place, self._share = architecture, device, place, share
        num_tokens = -(-spec.vocab_size // place.tensor_size)  # of the last shard some are of no token

        def vocabulary(is_here: bool) -> Linear:
            parts = [("lm_head", num_tokens if is_here else 0)]
            return Linear(spec.hidden_size, parts, has_bias=False, dtype=dtype, device=device)

        self._embedding_VD = vocabulary(place.is_first).weight_ED
        self._layers = [
            DecoderLayer(index, architecture, share, place, dtype=dtype, device=device, quantization=quantization)
            for index in share.layers
        ]
        self._norm = RMSNorm((spec.hidden_size,), architecture.norm_eps, dtype=dtype, device=device)
        self._head = vocabulary(place.is_last and not self._shares_ends)
        if self._shares_ends:
            self._head.weight_ED = self._embedding_VD
        self._min_rows = MIN_ROWS if device.type == "cpu" else 1
        self._rope = RopeTable(architecture.rope, num_positions=num_positions, device=device)
        self.weight_bytes = sum(parameter.nbytes for parameter in self.parameters().values())
        self.num_bytes_read = 0

    @property
    def _shares_ends(self) -> bool:
        """Whether the tied embedding and head of this rank are one storage: they are on the same stage."""
        return self.architecture.ties_embeddings and self.place.is_first and self.place.is_last

    def parameters(self) -> dict[str, Storage]:
        named = {name: part for layer in self._layers for name, part in layer.parameters().items()}
        num_tokens = len(self._share.tokens)
        if self.place.is_first:
            named[_EMBEDDING] = self._embedding_VD[:num_tokens]
        if self.place.is_last:
            named[_NORM] = self._norm.weight
            if not self._shares_ends:
                named[_EMBEDDING if self.architecture.ties_embeddings else _HEAD] = self._head.weight_ED[:num_tokens]
        return named

    def cuts(self) -> dict[str, Cut]:
        if self.place.tensor_size == 1:
            return {}
        tokens = Cut(0, self._share.tokens.start)
        return {_EMBEDDING: tokens, _HEAD: tokens} | {
            name: cut for layer in self._layers for name, cut in layer.cuts().items()
        }

    def shapes(self) -> dict[str, torch.Size]:
        return self._shapes

    def finish(self) -> None:
        for layer in self._layers:
            layer.finish()
        if self.place.is_last:
            self._norm.finish()
            self._head.finish()

    def _begin(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        return self._embed(token_ids_T) if self.place.is_first else self._receive(token_ids_T.shape[0])

    def _end(self, x_TD: torch.Tensor, owed_TD: torch.Tensor | None) -> torch.Tensor:
        """On another stage than the last the activations are sent on; what `forward` then returns is nobody's."""
        if self.place.is_last:
            return self._norm.after(x_TD, owed_TD)[1]
        if owed_TD is not None:
            x_TD.add_(owed_TD)
        self.place.send(x_TD)
        return x_TD

    @torch.inference_mode()
    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """logits_RV, the same on every rank of the last stage; no other has any."""
        assert self.place.is_last
        num_rows = hidden_RD.shape[0]
        if num_rows < self._min_rows:
            hidden_RD = F.pad(hidden_RD, (0, 0, 0, self._min_rows - num_rows))
        logits_RS = self._head(hidden_RD)[:num_rows]
        return self.place.gather(logits_RS, -1)[:, : self.spec.vocab_size].float()

    def _embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """Every token's row from the shard that has it, by a sum in which the others give zeros."""
        if self.place.tensor_size == 1:
            return F.embedding(token_ids_T, self._embedding_VD)
        own_T = token_ids_T - self._share.tokens.start
        is_foreign_T = (own_T < 0) | (own_T >= len(self._share.tokens))
        x_TD = F.embedding(own_T.masked_fill_(is_foreign_T, 0), self._embedding_VD)
        return self.place.sum_(x_TD.masked_fill_(is_foreign_T[:, None], 0))

    def _receive(self, num_rows: int) -> torch.Tensor:
        shape = (num_rows, self.spec.hidden_size)
        return self.place.receive(torch.empty(shape, dtype=self.spec.dtype, device=self.device))


_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def _whole(architecture: DenseArchitecture, quantization: Quantization) -> dict[str, Storage]:
    """Every tensor of the whole model, without memory."""
    spec, share, meta = architecture.spec, Share.of(architecture), torch.device("meta")
    vocabulary = torch.empty(spec.vocab_size, spec.hidden_size, device=meta)
    whole: dict[str, Storage] = {_EMBEDDING: vocabulary, _NORM: vocabulary[0]}
    if not architecture.ties_embeddings:
        whole[_HEAD] = vocabulary
    for index in share.layers:
        layer = DecoderLayer(index, architecture, share, dtype=spec.dtype, device=meta, quantization=quantization)
        whole.update(layer.parameters())
    return whole
