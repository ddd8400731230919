"""What monitors log, computed by hand from faked steps."""

from types import SimpleNamespace

import pytest
import torch

from src.data.packing import Counts, SplitBatch
from src.train import monitors
from src.train.monitors import StepMonitor, StreamShares


class Log(list):
    """In place of Composer's Logger: the logged metrics."""

    def log_metrics(self, metrics):
        self.append(metrics)


def test_step_monitor_averages_over_its_window(monkeypatch):
    """Steps of 10, 6, 4 and 5 seconds, of which 2, 1, 3 and 1 wait for data; the first is warmup, the window is 2."""
    now, logged = [0.0], Log()
    monkeypatch.setattr(monitors, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monitor = StepMonitor(window_size=2, warmup=1, gpu_flops_available=1e9)
    model = SimpleNamespace(flops_per_batch=lambda batch: 10**8 * batch.counts.num_tokens)
    state = SimpleNamespace(model=model, is_model_ddp=False)
    monitor.fit_start(state, logged)
    tokens, samples = [30, 40, 25, 15], [4, 5, 3, 2]
    at = SimpleNamespace(token=SimpleNamespace(value=1000), sample=SimpleNamespace(value=100))
    for step, (seconds, waited) in enumerate([(10, 2), (6, 1), (4, 3), (5, 1)]):
        monitor.before_dataloader(state, logged)
        now[0] += waited
        monitor.after_dataloader(state, logged)
        now[0] += seconds - waited
        counts = Counts(0, num_tokens=tokens[step], num_masked=step, positions=50, max_seqlen=10, squares=0)
        state.batch = SplitBatch(torch.zeros(0), [], counts)
        state.previous_timestamp, before = at, at
        at = SimpleNamespace(  # of two processes
            token=SimpleNamespace(value=before.token.value + 2 * tokens[step]),
            sample=SimpleNamespace(value=before.sample.value + 2 * samples[step]),
        )
        state.timestamp = at
        monitor.batch_end(state, logged)
        now[0] += 1000  # evaluation and saving do not count
    assert logged[:2] == [
        {"step/fill": 30 / 50, "step/masked_tokens": 0},
        {"step/fill": 40 / 50, "step/masked_tokens": 1},
    ]
    rates = logged[2::2]
    assert len(rates) == 3
    for i, (seconds, waited, first) in enumerate([(6, 1, 1), (10, 4, 1), (9, 4, 2)]):
        got, part = rates[i], slice(first, i + 2)
        assert got["step/tokens_per_s"] == pytest.approx(2 * sum(tokens[part]) / seconds)
        assert got["step/samples_per_s"] == pytest.approx(2 * sum(samples[part]) / seconds)
        assert got["step/data_wait_share"] == pytest.approx(waited / seconds)
        assert got["step/mfu"] == pytest.approx(1e8 * sum(tokens[part]) / seconds / 1e9)


def test_stream_shares_count_tokens_since_the_last_log():
    shares, logged = StreamShares(), Log()
    shares.names, shares.tokens = ["a", "b"], torch.zeros(2, dtype=torch.int64)
    state = SimpleNamespace(device=SimpleNamespace(tensor_to_device=lambda tensor: tensor.clone()))

    def load(streams, lengths):
        mask = (torch.arange(10) < torch.tensor(lengths)[:, None]).long()
        state.batch = {"attention_mask": mask, "stream": torch.tensor(streams)[:, None]}
        shares.after_dataloader(state, logged)

    load([0, 1, 0], [2, 10, 3])
    load([0], [4])
    shares.epoch_end(state, logged)
    assert logged[-1] == pytest.approx({"data/token_share/a": 9 / 19, "data/token_share/b": 10 / 19})
    load([1, 0], [1, 7])
    shares.epoch_end(state, logged)
    assert logged[-1] == pytest.approx({"data/token_share/a": 7 / 8, "data/token_share/b": 1 / 8})
