"""Paper 1's data: windows of tokens from a corpus's shards, for pretraining a language model and for going on from one."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from datamodules.shards import TokenShards, build_shards
from datamodules.sources import DataCard
from datamodules.text import SPLITS, corpus
from datamodules.token_order import EvalOrder, TokenLoader, TrainOrder, Windows
from datamodules.tokenise import vocab_of


class TokenData(LightningDataModule):
    """Batches of (x int64 (B, S), y int64 (B, S)): S tokens and those that follow each of them.

    Windows do not overlap. An epoch takes the next `train_samples` of an endless row of permutations of all of them, keyed
    by (seed, stream, pass): every window comes once before any comes again. A run that is stopped and resumed inside an
    epoch goes on with the very next batch. Validation and test windows are evenly spaced and the same for every seed.
    Processes that train together share training and validation windows; each sees all test windows, so that what is measured
    within a test batch does not depend on their number.

    Args:
        name: of a corpus, see `datamodules.text`.
        context: S.
        batch_size: B, sequences per step over all ranks together: the steps are the same on one device and on many.
        seed: with stream, the key of the order.
        train_samples: sequences per epoch; None for as many whole batches as there are windows, the rest of which begin the
            next epoch.
        val_samples, test_samples: sequences of the evaluation sets, or None for all there are.
        tokenizer: "bytes" or "bpe:VOCAB".
        stream: a word; a parent's pretraining and its continuation see different orders by different words.
        eval_batch_size: at most so many sequences per evaluation batch on each rank.
        num_workers: loading processes.
    Raises:
        ValueError: an unknown name or impossible size; in `setup`, sizes beyond what the corpus holds.
        DataUnavailable: in `setup`, nothing led to the corpus.
        ShardError: in `setup`, shards that exist are not whole.
    """

    shares_batches = True  # the steps of several processes are those of one

    def __init__(
        self,
        name: str,
        context: int,
        batch_size: int,
        seed: int,
        train_samples: int | None = None,
        val_samples: int | None = None,
        test_samples: int | None = None,
        tokenizer: str = "bytes",
        stream: str = "pretrain",
        eval_batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        corpus(name)
        self.vocab = vocab_of(tokenizer)
        sizes = {"context": context, "batch_size": batch_size, "eval_batch_size": eval_batch_size}
        optional = {"train_samples": train_samples, "val_samples": val_samples, "test_samples": test_samples}
        for argument, value in (sizes | {key: value for key, value in optional.items() if value is not None}).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{argument} must be an int of at least 1, got {value!r}")
        self.corpus_name, self.context, self.batch_size, self.seed = name, context, batch_size, seed
        self.train_samples, self.samples = train_samples, {"val": val_samples, "test": test_samples}
        self.tokenizer, self.stream = tokenizer, stream
        self.eval_batch_size, self.num_workers = eval_batch_size, num_workers
        self.input_shape = (context,)
        self.card: DataCard | None = None

    def setup(self, stage: str | None = None) -> None:
        """Open the shards, which are made the first time; stages share them."""
        if self.card is not None:
            return
        self.folder = build_shards(self.corpus_name, self.tokenizer)
        self.shards = {split: TokenShards(self.folder / split) for split in SPLITS}
        self.windows = {split: Windows(self.shards[split], self.context) for split in SPLITS}
        for split in SPLITS:
            self._check(split)
        self.card = self.shards["train"].card

    def _check(self, split: str) -> None:
        n, tokens, documents = len(self.windows[split]), len(self.shards[split]), self._made(split)["documents"]
        what = f"the {split} split of '{self.corpus_name}' ({documents} documents, {tokens} tokens as {self.tokenizer})"
        if not n:
            raise ValueError(f"{what} is shorter than one sequence: context {self.context} takes {self.context + 1}")
        if split == "train" and n < self.batch_size:
            raise ValueError(f"{what} holds {n} sequences of context {self.context}, a batch takes {self.batch_size}")
        asked = self.samples.get(split)
        if asked is not None and asked > n:
            raise ValueError(f"{split}_samples is {asked}, but {what} holds {n} sequences of context {self.context}")

    def _made(self, split: str) -> dict[str, Any]:
        return self.shards[split].manifest

    @property
    def train_size(self) -> int:
        """Sequences seen in one epoch, by all ranks together."""
        return self.train_samples or len(self.windows["train"]) // self.batch_size * self.batch_size

    @property
    def train_tokens(self) -> int:
        """Tokens of the training split; one epoch sees train_size * context."""
        return len(self.shards["train"])

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token of the validation split: bits per byte = nats per token / ln 2 / this."""
        return self.shards["val"].bytes_per_token

    def train_dataloader(self) -> TokenLoader:
        """Training batches."""
        order = TrainOrder(
            len(self.windows["train"]),
            self.batch_size,
            self.train_size,
            self.seed,
            self.stream,
            *self._rank_and_world(),
        )
        about = {
            "corpus": self.shards["train"].card.sha256,
            "tokenizer": self._made("train")["tokenizer_sha256"],
            "context": self.context,
            "batch_size": self.batch_size,
            "train_size": self.train_size,
            "seed": self.seed,
            "stream": self.stream,
        }
        return TokenLoader(self.windows["train"], order, self.num_workers, about)

    def val_dataloader(self) -> DataLoader:
        """Validation windows."""
        return self._evaluation("val", *self._rank_and_world())

    def test_dataloader(self) -> DataLoader:
        """Test windows, all of them in every process."""
        return self._evaluation("test", 0, 1)

    def _evaluation(self, split: str, rank: int, world: int) -> DataLoader:
        n = len(self.windows[split])
        order = EvalOrder(n, self.samples[split] or n, self.eval_batch_size, rank, world)
        return DataLoader(self.windows[split], sampler=order, batch_size=None, num_workers=self.num_workers)

    def _rank_and_world(self) -> tuple[int, int]:
        """Among the ranks that see different data: with tensor parallelism some see the same, which the strategy knows."""
        known = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        if known is not None:
            return known["rank"], known["num_replicas"]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1
