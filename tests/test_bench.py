"""bench.py: the fixed workload at toy size. What it takes is not asserted."""
import json

import pytest

import bench
from model import Config, LanguageModel
from plumbing.stage import peak_rss_mb
from plumbing.weights import save_model

TOY = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
           num_attention_heads=2, num_key_value_heads=2)


@pytest.mark.parametrize("what, figure", [
    ("sft", "tokens_per_s"), ("reward", "pairs_per_s"), ("generate", "tokens_per_s"),
    ("ppo", "s_per_iteration")])
def test_each_figure_is_measured_on_a_folder_with_a_workload(what, figure, tmp_path, capsys,
                                                             monkeypatch):
    monkeypatch.setattr(bench, "sgemm_gflops", lambda: 1.0)     # it takes seconds
    save_model(tmp_path / "model", LanguageModel(Config(**TOY)))
    rows = bench.random_rows(40, 3, 6, vocab=50)
    lines = [json.dumps({"prompt": p, "response": r}) for p, r in rows]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    bench.main([what, "--workload", str(tmp_path), "--repeats", "2", "--new", "3"])
    found = json.loads(capsys.readouterr().out)
    assert found["bench"] == what and len(found["windows"]) == 2 and found[figure] > 0
    assert found["peak_rss_mb"] <= peak_rss_mb() and found["gflops"] > 0
