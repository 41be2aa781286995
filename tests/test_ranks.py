import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from relloc import ranks

SCRIPT = """
import json
import sys
from pathlib import Path

import torch

from relloc import ranks

ranks.join(torch.device("cpu"))
rank = ranks.rank()
values = torch.tensor([1.0, 10.0 * rank], dtype=torch.float64)
answers = {
    "rank": rank,
    "local_rank": ranks.local_rank(),
    "world_size": ranks.world_size(),
    "total": ranks.total(values).tolist(),
    "in place": values.tolist(),
    "from_first": ranks.from_first(f"folder of rank {rank}, \\u00e4"),
    "union": ranks.union({"both": f"said by {rank}", f"only {rank}": str(rank)}),
    "empty union": ranks.union({}),
    "gathered_on_first": ranks.gathered_on_first([rank] * (1 + 2 * rank)),
}
ranks.leave()
sum_alone = ranks.total(torch.tensor(5 + rank)).item()
answers["after"] = [ranks.world_size(), ranks.rank(), sum_alone, ranks.from_first("own")]
ranks.leave()
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(answers))
"""


def test_one_process_is_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    ranks.join(torch.device("cpu"))
    assert (ranks.world_size(), ranks.rank(), ranks.local_rank()) == (1, 0, 0)
    values = torch.tensor([1.5, 2.0])
    assert ranks.total(values) is values
    assert values.tolist() == [1.5, 2.0]
    assert ranks.from_first("runs/one") == "runs/one"
    assert ranks.union({"a.jpg": "empty"}) == {"a.jpg": "empty"}
    assert ranks.gathered_on_first({3: "a"}) == [{3: "a"}]
    ranks.leave()


def test_the_local_rank_is_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert ranks.local_rank() == 3


@pytest.mark.slow
def test_two_processes_add_tell_and_join(tmp_path: Path) -> None:
    script = tmp_path / "meet.py"
    script.write_text(SCRIPT, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*torchrun, str(script), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        answers = json.loads((tmp_path / f"{rank}.json").read_text())
        assert (answers["rank"], answers["local_rank"], answers["world_size"]) == (rank, rank, 2)
        assert answers["total"] == answers["in place"] == [2.0, 10.0]
        assert answers["from_first"] == "folder of rank 0, ä"
        assert answers["union"].keys() == {"both", "only 0", "only 1"}
        assert (answers["union"]["only 0"], answers["union"]["only 1"]) == ("0", "1")
        assert answers["empty union"] == {}
        assert answers["gathered_on_first"] == ([[0], [1, 1, 1]] if rank == 0 else [])
        assert answers["after"] == [1, 0, 5 + rank, "own"]
