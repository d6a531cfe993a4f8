"""The map from vision to language as a LightningModule: what is trained, on what loss, tested on what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Interval
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.lightning_modules.base import SafelightModule
from safelight.lightning_modules.randomness import row_generators, uniform
from safelight.lightning_modules.schedules import warmup_cosine
from safelight.lightning_modules.vision_mapping.adapters import Kind, load_adapter, new_adapter
from safelight.lightning_modules.vision_mapping.conversations import Batch, Chat
from safelight.lightning_modules.vision_mapping.dictionaries import read_dictionaries, sources_by_layer
from safelight.lightning_modules.vision_mapping.evaluation import CONTROLS, Evaluation, Findings
from safelight.lightning_modules.vision_mapping.judging import Judge, load_judge
from safelight.lightning_modules.vision_mapping.objective import answer_losses, mean_loss
from safelight.lightning_modules.vision_mapping.reading import recomputed, run, without_softcap
from safelight.lightning_modules.vision_mapping.splicing import check_positions, over
from safelight.probing.dictionary import Architecture, SparseDictionary
from safelight.probing.language import load_language_model, load_tokenizer, width_of
from safelight.probing.tap import ActivationTap, blocks_of
from safelight.probing.vision import front_tokens, load_vision_model, patch_features, pooled

Control = Literal["random_adapter", "norm_matched", "shuffled_images", "random_sae", "noise_text", "caption_text"]
MAX_LENGTH = {"pretrain": 512, "finetune": 1024}


class VisionMapping(SafelightModule):
    """A linear map puts pictures into a frozen language model, whose dictionaries then read them (arXiv 2506.11976).

    Batches: a dict with ``image`` (B, 3, S, S) in [-1, 1], ``conversation`` (B lists of pairs of question and answer),
    ``caption`` (B texts) and, in tests, ``index`` (B,).

    Args:
        vision_model: frozen vision transformer: ``zoo:<entry>``, a folder, or an id on the hub.
        llm: frozen language model with a chat template, named likewise.
        vision_feature_layer: block whose output is mapped (paper: -1, before the last norm; LLaVA: -2).
        drop_cls: leave out the tokens in front of the patches (paper); with them a picture is also told as a whole.
        pool: edge of the squares of patches that are averaged to one token (paper: 1).
        insert_pos: position of the first visual token (paper: 1, right behind BOS).
        stage: ``pretrain`` or ``finetune``; a label that says how long conversations may be (paper: 512 and 1024).
        max_length: tokens of a conversation, visual ones not counted; null for the stage's.
        adapter: ``linear`` (paper) or ``mlp``, two layers.
        init_gain: of the initial weights. Vectors much longer than those of words drown what layers add to them.
        adapter_ckpt: weights to start from: a run, its export, a checkpoint or a ``.pth`` of the authors.
        lr: peak rate of AdamW (paper: 1e-3 in stage 1, 2e-5 in stage 2).
        min_lr: rate at the end of the cosine (paper: 1e-8).
        warmup_ratio: share of the steps with a linearly growing rate (paper: .03 in stage 1, 0 in stage 2).
        weight_decay: of the map (authors: AdamW's .01).
        skip_softcap: leave out Gemma 2's cap on logits in training, as the authors do.
        llm_dtype: of the language model's weights (authors: bfloat16 in training).
        activation_checkpointing: compute the language model's blocks again in the backward pass.
        cache_features: keep the vision transformer's features by ``index``; only for pictures that are always the same.
        layers: of the language model that are probed; null for all.
        saes: their sparse autoencoders: ``{layer: source}``, or one source with ``{layer}`` in it, see ``read_sae``;
            null to train them in this run on the captions and conversations as text.
        sae_architecture: of those trained here; with ``topk``, L0 is the same everywhere.
        sae_expansion: features for each dimension.
        sae_k: of them active for a vector.
        sae_dead_after: steps without firing after which a feature gets the auxiliary loss (sae-lens: 1000). Where a run
            is no longer than that, features stay dead and not even words are matched.
        sae_lr: peak rate of Adam for them.
        sae_rows: tokens drawn from each text of a batch.
        sae_scale: what they multiply vectors by; null to take it from the first batch.
        text_surrogate: what is read in place of the picture, with ``{caption}`` in it; null for the caption and a line
            break, as ``tiny_lm`` knows it.
        surrogate_place: ``image``, where the picture would be, or ``question``, before the first question (authors).
        descriptions: folder of Neuronpedia's explanations by layer; null for the words at which features fire.
        label: key of the batch that says what is in the picture, for the judge.
        judge: ``lexical``, ``chat:<model>`` or ``vlm:<model>`` (paper: GPT-4o, which looks at the picture).
        n_top: strongest features whose descriptions are judged (paper: 3).
        freq_max: leave out features that are active in a larger share of pictures (paper: .05).
        density_max: or, where their descriptions say so, of tokens (paper: .005).
        pool_size: test pictures that give other pictures, words of features and these shares.
        tolerance: octaves within which a layer's L0 counts as that of text.
        bootstrap: resampled sets of pictures for intervals.
        controls: what is measured beside it; null for all.
        seed: of initial weights and draws.
    """

    metric_names = (
        "adapter_accuracy", "adapter_ce", "fvu_first", "fvu_last", "fvu_ratio_first", "fvu_ratio_last", "fvu_text",
        "match_rate", "match_chance", "convergence_layer",
    )  # fmt: skip
    frozen = ("vision", "llm", "given")

    def __init__(
        self,
        *,
        vision_model: str = "zoo:tiny_clip",
        llm: str = "zoo:tiny_lm",
        vision_feature_layer: int = -1,
        drop_cls: bool = True,
        pool: Annotated[int, Ge(1)] = 1,
        insert_pos: Annotated[int, Ge(0)] = 1,
        stage: Literal["pretrain", "finetune"] = "pretrain",
        max_length: Annotated[int, Ge(2)] | None = None,
        adapter: Kind = "linear",
        init_gain: Annotated[float, Gt(0)] = 1.0,
        adapter_ckpt: str | None = None,
        lr: Annotated[float, Gt(0)] = 1e-3,
        min_lr: Annotated[float, Ge(0)] = 1e-8,
        warmup_ratio: Annotated[float, Interval(ge=0, lt=1)] = 0.03,
        weight_decay: Annotated[float, Ge(0)] = 0.01,
        skip_softcap: bool = False,
        llm_dtype: Literal["float32", "bfloat16"] = "float32",
        activation_checkpointing: bool = False,
        cache_features: bool = False,
        layers: list[int] | None = None,
        saes: str | dict[int, str] | None = None,
        sae_architecture: Architecture = "batchtopk",
        sae_expansion: Annotated[float, Gt(0)] = 8,
        sae_k: Annotated[float, Gt(0)] = 16,
        sae_dead_after: Annotated[int, Ge(1)] = 1000,
        sae_lr: Annotated[float, Gt(0)] = 2e-3,
        sae_rows: Annotated[int, Ge(1)] = 16,
        sae_scale: Annotated[float, Gt(0)] | None = None,
        text_surrogate: str | None = None,
        surrogate_place: Literal["image", "question"] = "image",
        descriptions: str | None = None,
        label: str = "caption",
        judge: str = "lexical",
        n_top: Annotated[int, Ge(1)] = 3,
        freq_max: Annotated[float, Interval(gt=0, le=1)] = 0.05,
        density_max: Annotated[float, Interval(gt=0, le=1)] | None = 0.005,
        pool_size: Annotated[int, Ge(2)] = 256,
        tolerance: Annotated[float, Gt(0)] = 0.5,
        bootstrap: Annotated[int, Ge(1)] = 1000,
        controls: list[Control] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if text_surrogate is not None and "{caption}" not in text_surrogate:
            raise SafelightError(f"text_surrogate={text_surrogate!r}: write {{caption}} where the caption goes")
        self.control_names = CONTROLS if controls is None else tuple(controls)
        self.vision = load_vision_model(vision_model)
        self.llm: Any = load_language_model(llm, dtype=llm_dtype)
        check_positions(self.llm)
        self.chat = Chat(load_tokenizer(llm), insert_pos)
        self.judge: Judge = load_judge(judge)
        self.width = width_of(self.llm)
        self.projection = new_adapter(adapter, self.vision.width, self.width, seed, init_gain)
        if adapter_ckpt is not None:
            load_adapter(self.projection, adapter_ckpt)
        self.layers = self._layers(layers)
        self.given: nn.ModuleDict | None = None
        self.dictionaries = nn.ModuleDict()
        if saes is not None:
            self.given = read_dictionaries(sources_by_layer(saes, self.layers))
        else:
            self.dictionaries = nn.ModuleDict({str(layer): self._new_dictionary(layer) for layer in self.layers})
        self.freeze_parts()
        self._cache: dict[int, Tensor] = {}
        self.found = Findings()
        self.history: list[tuple[int, Tensor]] = []

    def _layers(self, layers: list[int] | None) -> list[int]:
        count = len(blocks_of(self.llm)[1])
        chosen = list(range(count)) if layers is None else sorted({n + count if n < 0 else n for n in layers})
        if not chosen or chosen[0] < 0 or chosen[-1] >= count:
            raise SafelightError(f"layers={layers}: {self.hparams.llm} has layers 0 to {count - 1}; give at least one")
        return chosen

    def _new_dictionary(self, layer: int) -> SparseDictionary:
        h = self.hparams
        return SparseDictionary(
            self.width, round(h.sae_expansion * self.width), architecture=h.sae_architecture, k=h.sae_k,
            dead_after=h.sae_dead_after, scale=h.sae_scale, seed=h.seed + layer,
        )  # fmt: skip

    def coders(self) -> dict[int, Any]:
        """Dictionaries by layer, read or trained here."""
        held = self.dictionaries if self.given is None else self.given
        return {int(layer): dictionary for layer, dictionary in held.items()}

    # -- what goes in ------------------------------------------------------------------------------------------------

    @property
    def longest(self) -> int:
        """Positions of the longest row there can be."""
        h, config = self.hparams, self.llm.config
        most = (h.max_length or MAX_LENGTH[h.stage]) + self._visual_tokens + 64
        known = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        return min(int(known), most) if known else most

    @property
    def _visual_tokens(self) -> int:
        config: Any = self.vision.tower.config
        return self.front + int(config.image_size // config.patch_size // self.hparams.pool) ** 2

    @property
    def front(self) -> int:
        """Tokens in front of the patches that are kept."""
        return 0 if self.hparams.drop_cls else front_tokens(self.vision)

    @torch.no_grad()
    def features(self, batch: dict[str, Any]) -> Tensor:
        """(B, N, d), what the vision transformer says about the pictures of a batch.

        Raises:
            SafelightError: the batch has none.
        """
        if not isinstance(batch, dict) or not {"image", "conversation", "caption"} <= batch.keys():
            shown = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
            raise SafelightError(f"batch: expected image, conversation and caption, got {shown}")
        index = batch["index"].tolist() if self.hparams.cache_features and "index" in batch else None
        if index is not None and all(number in self._cache for number in index):
            return torch.stack([self._cache[number] for number in index])
        h = self.hparams
        found = patch_features(self.vision, batch["image"], h.vision_feature_layer, h.drop_cls)
        front = self.front
        found = torch.cat([found[:, :front], pooled(found[:, front:], h.pool)], 1)
        if index is not None:
            self._cache |= dict(zip(index, found, strict=True))
        return found

    def image_batch(self, batch: dict[str, Any]) -> Batch:
        """Conversations with room for the pictures."""
        filled = [[self.chat.fill] * self._tokens_of(batch["image"])] * len(batch["conversation"])
        return self._batch(batch["conversation"], filled)

    def text_batch(self, batch: dict[str, Any]) -> Batch:
        """Conversations with captions in place of the pictures."""
        surrogate = self.hparams.text_surrogate or "{caption}\n"
        texts = [surrogate.replace("{caption}", caption) for caption in batch["caption"]]
        if self.hparams.surrogate_place == "image":
            return self._batch(batch["conversation"], [self.chat.tokens(text) for text in texts])
        told = [
            [(text + lines[0][0], lines[0][1]), *lines[1:]]
            for text, lines in zip(texts, batch["conversation"], strict=True)
        ]
        return self._batch(told, [[]] * len(told))

    def _tokens_of(self, images: Tensor) -> int:
        config: Any = self.vision.tower.config
        return self.front + int(images.shape[-1] // config.patch_size // self.hparams.pool) ** 2

    def _batch(self, conversations: Any, inserted: list[list[int]]) -> Batch:
        h = self.hparams
        # A caption may not crowd out what is asked about it.
        inserted = [new[: self.longest // 2] for new in inserted]
        most = h.max_length or MAX_LENGTH[h.stage]
        return self.chat.batch(conversations, inserted, most, self.longest).to(self.device)

    def labels(self, batch: dict[str, Any]) -> list[str]:
        """What a judge compares descriptions with.

        Raises:
            SafelightError: the batch does not say.
        """
        if self.hparams.label not in batch:
            raise SafelightError(f"label={self.hparams.label}: a batch has only {', '.join(sorted(batch))}")
        return list(batch[self.hparams.label])

    # -- training ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Cross entropy of the answers, and the loss of the dictionaries on words; they share no weight."""
        visual = self.projection(self.features(batch))
        rows = self.image_batch(batch)
        with recomputed(self.llm, self.hparams.activation_checkpointing), without_softcap(
            self.llm, self.hparams.skip_softcap
        ):  # fmt: skip
            logits = run(self.llm, rows, over(self.llm, visual, self.hparams.insert_pos)).logits
        loss = mean_loss(*answer_losses(logits, rows.ids, rows.turns))
        size = len(visual)
        self.log("train/answers", loss.detach(), prog_bar=True, batch_size=size)
        self.history.append((self.trainer.global_step, loss.detach()))
        if len(self.dictionaries):
            loss = loss + self._dictionary_loss(batch, batch_idx)
        self.log("train/loss", loss.detach(), batch_size=size)
        return loss

    def _word_vectors(self, batch: dict[str, Any], batch_idx: int) -> dict[int, Tensor]:
        """(B * sae_rows, d) by layer, at as many tokens of each text, drawn from all but the first."""
        rows = self.text_batch(batch)
        names = {layer: f"resid_post.{layer}" for layer in self.layers}
        states = ActivationTap(self.llm, list(names.values()))(
            input_ids=rows.ids, attention_mask=rows.mask, use_cache=False
        )
        generators = row_generators(self, self.hparams.seed, len(rows.ids), batch_idx)
        shares = torch.stack([uniform([generator] * self.hparams.sae_rows) for generator in generators])
        length = rows.mask.sum(1, keepdim=True) - 1
        places = 1 + (shares.to(self.device) * length).long()
        places = places[..., None].expand(-1, -1, self.width)
        return {layer: states[name].float().gather(1, places).flatten(0, 1) for layer, name in names.items()}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """The first batch tells the dictionaries' scale; before the step, in which weights may be in use already."""
        if self.given is None and not all(dictionary.begun for dictionary in self.coders().values()):
            for layer, x in self._word_vectors(batch, batch_idx).items():
                self.coders()[layer].begin(x)

    def _dictionary_loss(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Of all layers, on words."""
        losses = []
        for layer, x in self._word_vectors(batch, batch_idx).items():
            loss, parts = self.coders()[layer].loss(x)
            losses.append(loss)
            self.log(f"train/sae_{layer}", parts["mse"], batch_size=len(x))
        return torch.stack(losses).sum()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """A step of the dictionaries ends, too."""
        if self.given is None:
            for dictionary in self.coders().values():
                dictionary.advance()

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **keywords: Any) -> None:
        """As the trainer says for the map; each dictionary by itself to a norm of 1 (sae-lens)."""
        for dictionary in self.dictionaries.values():
            nn.utils.clip_grad_norm_(dictionary.parameters(), 1.0)
        if self.trainer.gradient_clip_val:
            nn.utils.clip_grad_norm_(self.projection.parameters(), self.trainer.gradient_clip_val)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW; the map's rate falls by a cosine to its floor, the dictionaries' linearly in the last fifth."""
        h = self.hparams
        total = max(int(self.trainer.estimated_stepping_batches), 1)
        warmup = round(h.warmup_ratio * total)
        floor = h.min_lr / h.lr

        def of_map(step: int) -> float:
            factor = warmup_cosine(step, warmup, total)
            return factor if step < warmup else floor + (1 - floor) * factor

        def of_dictionaries(step: int) -> float:
            return min(1.0, (step + 1) / max(0.05 * total, 1), (total - step) / max(0.2 * total, 1))

        groups: list[dict[str, Any]] = [{"params": list(self.projection.parameters()), "lr": h.lr}]
        factors: list[Any] = [of_map]
        if len(self.dictionaries):
            groups.append({"params": list(self.dictionaries.parameters()), "lr": h.sae_lr, "weight_decay": 0.0})
            factors.append(of_dictionaries)
        optimizer = torch.optim.AdamW(groups, weight_decay=h.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Forget an earlier training's curve."""
        self.history = []

    # -- tests -------------------------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        """Look at the pool of test pictures that all samples are compared with."""
        loaders = self.trainer.test_dataloaders
        self.evaluation = Evaluation(self, loaders[0] if isinstance(loaders, list) else loaders)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """See :class:`Evaluation`."""
        self.evaluation.step(batch)

    def on_test_epoch_end(self) -> None:
        """Log the map's metrics and those of its controls."""
        self.found = self.evaluation.finish()
        self.log_measured(self.found.measured)
        del self.evaluation

    # -- what is left behind -----------------------------------------------------------------------------------------

    def export(self, folder: Path) -> Path:
        """Write the map, its settings, figures by layer, the dictionaries trained here, and a card."""
        from safelight.lightning_modules.vision_mapping import report as pages

        pages.write_artefacts(self, folder)
        return folder

    def full_size_command(self) -> str:
        """CLIP-L and Gemma 2 with Gemma Scope, first stage."""
        return (
            "python train.py experiment=vision_mapping_gemma data.path=blip_laion_cc_sbu_558k.json "
            "data.image_folder=images"
        )
