"""Tests of the map and its controls: answers, reconstructions by layer, what the strongest features stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.lightning_modules.randomness import normal, row_generator
from safelight.lightning_modules.vision_mapping.adapters import new_adapter
from safelight.lightning_modules.vision_mapping.conversations import Batch
from safelight.lightning_modules.vision_mapping.descriptions import (
    Described,
    WordsAtFeatures,
    read_descriptions,
    words_of,
)
from safelight.lightning_modules.vision_mapping.dictionaries import (
    RandomDirections,
    at_inference,
    coded,
    features_of,
    fixed_sparsity,
)
from safelight.lightning_modules.vision_mapping.objective import answer_losses, answered_exactly
from safelight.lightning_modules.vision_mapping.probe import (
    AFTER,
    IMAGE,
    TEXT,
    Probe,
    Row,
    convergence_layer,
    peaks,
    strongest,
)
from safelight.lightning_modules.vision_mapping.reading import Seen, noisy, run
from safelight.lightning_modules.vision_mapping.splicing import over, rescaled, token_vectors
from safelight.metrics import SampleRows
from safelight.metrics.samples import mean_interval

if TYPE_CHECKING:
    from safelight.lightning_modules.vision_mapping.module import VisionMapping

TRAINED, RANDOM, NORMED, SHUFFLED = "trained", "random_adapter", "norm_matched", "shuffled_images"
RANDOM_SAE, NOISE, CAPTION = "random_sae", "noise_text", "caption_text"
CONTROLS = (RANDOM, NORMED, SHUFFLED, RANDOM_SAE, NOISE, CAPTION)
SHOWN = 6
"""Pictures in the report."""
CHUNK = 16
"""Pictures of the pool at a time, the same on every machine."""


@dataclass(frozen=True)
class Example:
    """A picture of the report: what was asked, what was said, and the strongest features of its tokens by layer."""

    image: Tensor
    question: str
    answer: str
    said: str
    features: dict[int, list[str]]


@dataclass
class Findings:
    """What tests have found.

    Attributes:
        measured: metrics by control; those of the map itself under ``""``.
        rows: figures by layer.
        examples: pictures.
        gain: accuracy above that with another picture, its 95 % interval over pictures, and their number.
    """

    measured: dict[str, dict[str, float]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    gain: tuple[float, float, float, int] | None = None

    def figure(self, adapter: str, kind: str, metric: str) -> dict[int, float]:
        """A figure by layer."""
        return {
            row.layer: row.mean
            for row in self.rows
            if (row.adapter, row.token_type, row.metric) == (adapter, kind, metric)
        }


class Evaluation:
    """One round of tests.

    A pool of test pictures, the same for all processes, is looked at first. It gives the other picture of each sample,
    what features stand for, how often they are active, and how long the vectors of words are.

    Args:
        module: whose map is tested.
        loader: of the test data.
    """

    def __init__(self, module: VisionMapping, loader: Any) -> None:
        self.module, h = module, module.hparams
        self.layers = module.layers
        self.dictionaries: dict[int, Any] = module.coders()
        self.adapters: dict[str, nn.Module] = {TRAINED: module.projection}
        fresh = new_adapter(h.adapter, module.vision.width, module.width, h.seed, h.init_gain).to(module.device)
        # The ratio to a map that has learned nothing is a metric, so that this one is always looked at.
        self.adapters[RANDOM] = fresh
        if NORMED in module.control_names:
            self.adapters[NORMED] = fresh
        if SHUFFLED in module.control_names:
            self.adapters[SHUFFLED] = module.projection
        self.probe = Probe(module.width, module.device)
        self.answers: dict[str, SampleRows] = {}
        self.random: dict[int, RandomDirections] = {}
        self.described: dict[int, Described] = {}
        self.usable: dict[tuple[str, str, int], Tensor] = {}
        self.examples: list[Example] = []
        with torch.no_grad(), at_inference(self.dictionaries):
            self._look_at_pool(loader)

    # -- the pool ----------------------------------------------------------------------------------------------------

    def _look_at_pool(self, loader: Any) -> None:
        module = self.module
        data = loader.dataset
        count = min(len(data), module.hparams.pool_size)
        if count < 2:
            raise SafelightError("test data: give two pictures at least; each is compared with another one")
        places = [round(i * (len(data) - 1) / (count - 1)) for i in range(count)]
        items = [data[place] for place in places]
        batches = [loader.collate_fn(items[start : start + CHUNK]) for start in range(0, count, CHUNK)]
        batches = [module.transfer_batch_to_device(batch, module.device, 0) for batch in batches]
        self.pool_index = torch.cat([torch.as_tensor(batch["index"]) for batch in batches]).tolist()
        self.pool_labels = [label for batch in batches for label in module.labels(batch)]
        self.pool_images = torch.cat([batch["image"] for batch in batches])
        self.pool = torch.cat([module.features(batch) for batch in batches])
        self._read_words(batches)
        self._count_features(batches)
        self._show(batches)

    def _read_words(self, batches: Sequence[dict[str, Any]]) -> None:
        """Norms of word vectors, descriptions of features, and how many are active on text."""
        module, h = self.module, self.module.hparams
        described = {layer: WordsAtFeatures(features_of(made)) for layer, made in self.dictionaries.items()}
        norms, active, tokens = [], dict.fromkeys(self.layers, 0.0), 0
        active_in: dict[int, Tensor] = {}
        for batch in batches:
            rows = module.text_batch(batch)
            vectors = token_vectors(module.llm, rows.ids)
            norms.append(vectors[rows.text].float().norm(dim=-1))
            seen = run(module.llm, rows, None, self.layers)
            words = [word for line, mask in zip(rows.ids, rows.text, strict=True) for word in self._words(line[mask])]
            tokens += int(rows.text.sum())
            for layer, dictionary in self.dictionaries.items():
                codes = coded(dictionary, seen.states[layer])[0]
                active[layer] += float((codes[rows.text] != 0).sum())
                fired = (peaks(codes, rows.text) > 0).sum(0)
                active_in[layer] = active_in.get(layer, torch.zeros_like(fired)) + fired
                if h.descriptions is None:
                    described[layer].add(codes[rows.text].float(), words)
        self.norm = torch.cat(norms).mean()
        if h.descriptions is None:
            self.described = {layer: words_at.described() for layer, words_at in described.items()}
        else:
            self.described = read_descriptions(h.descriptions, self.layers)
        for layer, dictionary in self.dictionaries.items():
            self.usable[TRAINED, TEXT, layer] = self._kept(layer, active_in[layer])
            k = round(active[layer] / max(tokens, 1))
            self.random[layer] = RandomDirections(dictionary, k, module.hparams.seed)

    def _words(self, ids: Tensor) -> list[str]:
        return words_of(self.module.chat.tokenizer.convert_ids_to_tokens(ids.tolist()))

    def _kept(self, layer: int, active_in: Tensor) -> Tensor:
        """(m,), features that can be shown to a judge: described, and active in few of the pool's pictures."""
        h = self.module.hparams
        rare = active_in / len(self.pool_index) <= h.freq_max
        kept: Tensor = rare & self.described[layer].usable(len(rare), h.density_max).to(rare.device)
        return kept

    def _count_features(self, batches: Sequence[dict[str, Any]]) -> None:
        """In how many pictures of the pool each feature is active, for each adapter."""
        for adapter in self.adapters:
            if adapter == SHUFFLED:
                # The same pictures in another order.
                self.usable |= {(SHUFFLED, IMAGE, n): self.usable[TRAINED, IMAGE, n] for n in self.layers}
                continue
            counts: dict[int, Tensor] = {}
            for start, batch in zip(range(0, len(self.pool), CHUNK), batches, strict=True):
                rows = self.module.image_batch(batch)
                features = self.pool[start : start + CHUNK]
                seen = self._see(adapter, features, torch.as_tensor(batch["index"]), rows)
                for layer, dictionary in self.dictionaries.items():
                    peak = peaks(coded(dictionary, seen.states[layer])[0], rows.inserted)
                    counts[layer] = counts.get(layer, 0) + (peak > 0).sum(0)
            self.usable |= {(adapter, IMAGE, layer): self._kept(layer, fired) for layer, fired in counts.items()}

    def _show(self, batches: Sequence[dict[str, Any]]) -> None:
        """Examples for the report, spread over the pool."""
        step = max(1, len(self.pool_index) // SHOWN)
        for number in range(0, len(self.pool_index), step):
            batch = batches[number // CHUNK]
            one = {key: value[number % CHUNK : number % CHUNK + 1] for key, value in batch.items()}
            rows = self.module.image_batch(one)
            seen = self._see(TRAINED, self.pool[number : number + 1], torch.as_tensor(one["index"]), rows)
            guess = seen.logits[0, :-1].argmax(-1)
            said = guess[rows.turns[0, rows.ids.shape[1] - seen.logits.shape[1] + 1 :] == 1]
            features = {
                layer: self._texts((TRAINED, IMAGE, layer), coded(made, seen.states[layer])[0], rows.inserted)[0]
                for layer, made in self.dictionaries.items()
            }
            (question, answer), *_ = one["conversation"][0]
            text = self.module.chat.tokenizer.decode(said, skip_special_tokens=True).strip()
            self.examples.append(Example(one["image"][0].cpu(), question, answer, text, features))
        self.examples = self.examples[:SHOWN]

    # -- every sample ------------------------------------------------------------------------------------------------

    def donors(self, index: Tensor) -> list[int]:
        """For each sample the place in the pool of another picture; a function of the sample's index alone."""
        found = []
        for own in index.tolist():
            place = int(
                torch.randint(len(self.pool_index), (1,), generator=row_generator(self.module.hparams.seed, own))
            )
            found.append((place + 1) % len(self.pool_index) if self.pool_index[place] == own else place)
        return found

    def step(self, batch: dict[str, Any]) -> None:
        """Take in a test batch."""
        index = torch.as_tensor(batch["index"])
        features, rows = self.module.features(batch), self.module.image_batch(batch)
        with at_inference(self.dictionaries):
            for adapter in self.adapters:
                seen = self._see(adapter, features, index, rows)
                self._answered(adapter, seen, rows, index)
                self._look(adapter, IMAGE, seen, rows.inserted, batch)
                if adapter == TRAINED:
                    self._look(adapter, AFTER, seen, rows.after, batch)
                    self._look_at_random(IMAGE, seen, rows.inserted, index)
            self._step_text(batch, index)

    def _step_text(self, batch: dict[str, Any], index: Tensor) -> None:
        module = self.module
        rows = module.text_batch(batch)
        seen = run(module.llm, rows, None, self.layers)
        self._answered(CAPTION, seen, rows, index)
        self._look(TRAINED, TEXT, seen, rows.text, batch)
        self._look_at_random(TEXT, seen, rows.text, index)
        if NOISE in module.control_names:
            # As many numbers for each row as the longest there can be, so that padding does not change them.
            generators = [row_generator(module.hparams.seed + 1, own) for own in index.tolist()]
            noise = normal(generators, (module.longest, module.width)).to(rows.ids.device)
            seen = run(module.llm, rows, noisy(rows.text, noise[:, : rows.ids.shape[1]]), self.layers)
            self._answered(NOISE, seen, rows, index)
            self._look(NOISE, TEXT, seen, rows.text, batch)

    def _see(self, adapter: str, features: Tensor, index: Tensor, rows: Batch) -> Seen:
        """Pictures (their features (B, N, d)) before the language model, by way of an adapter."""
        if adapter == SHUFFLED:
            features = self.pool[self.donors(index)]
        visual = self.adapters[adapter](features)
        if adapter == NORMED:
            visual = rescaled(visual, self.norm)
        return run(self.module.llm, rows, over(self.module.llm, visual, self.module.hparams.insert_pos), self.layers)

    def _answered(self, name: str, seen: Seen, rows: Batch, index: Tensor) -> None:
        losses, _ = answer_losses(seen.logits, rows.ids, rows.turns)
        right = answered_exactly(seen.logits, rows.ids, rows.turns)
        if name not in self.answers:
            self.answers[name] = SampleRows().to(self.module.device)
        self.answers[name].update(torch.stack([right.float(), losses.float()], 1), index)

    def _look(self, adapter: str, kind: str, seen: Seen, mask: Tensor, batch: dict[str, Any]) -> None:
        """Dictionaries at the positions of a mask (B, T); a judge hears what their strongest features stand for."""
        index = torch.as_tensor(batch["index"])
        donors = self.donors(index)
        others = [self.pool_labels[donor] for donor in donors]
        for layer, dictionary in self.dictionaries.items():
            codes, made = coded(dictionary, seen.states[layer])
            key = (adapter, kind, layer)
            self.probe.add(key, seen.states[layer], made, codes, mask, index)
            if key in self.usable:
                texts = self._texts(key, codes, mask)
                right = self.module.judge(texts, self.module.labels(batch), batch["image"])
                chance = self.module.judge(texts, others, self.pool_images[donors])
                self.probe.judge(key, right, chance, index)

    def _look_at_random(self, kind: str, seen: Seen, mask: Tensor, index: Tensor) -> None:
        if RANDOM_SAE not in self.module.control_names:
            return
        for layer, dictionary in self.random.items():
            codes, made = coded(dictionary, seen.states[layer])
            self.probe.add((RANDOM_SAE, kind, layer), seen.states[layer], made, codes, mask, index)

    def _texts(self, key: tuple[str, str, int], codes: Tensor, mask: Tensor) -> list[list[str]]:
        """What the strongest features of each row stand for."""
        found = strongest(peaks(codes, mask), self.usable[key], self.module.hparams.n_top)
        return [[self.described[key[2]].texts[number] for number in numbers] for numbers in found]

    # -- the end -----------------------------------------------------------------------------------------------------

    def finish(self) -> Findings:
        """All figures; processes put together what each has seen."""
        h = self.module.hparams
        found = Findings(rows=self.probe.rows(h.bootstrap, h.seed), examples=self.examples)
        answers = {name: metric.compute() for name, metric in self.answers.items()}
        for name, values in answers.items():
            if name == TRAINED or name in self.module.control_names:
                accuracy, loss = values.double().mean(0).tolist()
                found.measured["" if name == TRAINED else name] = {"adapter_accuracy": accuracy, "adapter_ce": loss}
        self._figures(found)
        if SHUFFLED in answers:
            gain = answers[TRAINED][:, 0] - answers[SHUFFLED][:, 0]
            found.gain = (float(gain.mean()), *mean_interval(gain, h.bootstrap, h.seed), len(gain))
        return found

    def _figures(self, found: Findings) -> None:
        first, last = self.layers[0], self.layers[-1]
        for adapter in (TRAINED, *self.module.control_names):
            kind = TEXT if adapter == NOISE else IMAGE
            fvu = found.figure(adapter, kind, "fvu")
            if fvu:
                metrics = found.measured.setdefault("" if adapter == TRAINED else adapter, {})
                metrics |= {"fvu_first": fvu[first], "fvu_last": fvu[last]}
                if match := found.figure(adapter, kind, "match_rate"):
                    metrics["match_rate"] = match[last]
        ours = found.measured[""]
        untrained = found.figure(RANDOM, IMAGE, "fvu")
        ours["fvu_ratio_first"] = ours["fvu_first"] / untrained[first]
        ours["fvu_ratio_last"] = ours["fvu_last"] / untrained[last]
        ours["fvu_text"] = _mean(found.figure(TRAINED, TEXT, "fvu"))
        if random_text := found.figure(RANDOM_SAE, TEXT, "fvu"):
            found.measured[RANDOM_SAE]["fvu_text"] = _mean(random_text)
        ours["match_chance"] = found.figure(TRAINED, IMAGE, "match_chance")[last]
        # Where each vector has the same number of features, all layers would be alike.
        metric = "fvu" if any(map(fixed_sparsity, self.dictionaries.values())) else "l0"
        ours["convergence_layer"] = convergence_layer(
            found.figure(TRAINED, IMAGE, metric), found.figure(TRAINED, TEXT, metric), self.module.hparams.tolerance
        )


def _mean(by_layer: Mapping[int, float]) -> float:
    return sum(by_layer.values()) / len(by_layer)
