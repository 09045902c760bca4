"""Shipped configurations and cluster files by name, in a checkout and as in a wheel."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.messages import assert_names

from proma_megatron.config import shipped
from proma_megatron.config.loading import load_config, read_tree
from proma_megatron.config.shipped import find_cluster, find_config
from proma_megatron.errors import ConfigError
from proma_megatron.launching.cluster import load_cluster

CHECKOUT = Path(__file__).parents[2]
CONFIGS = CHECKOUT / "configs"
CLUSTERS = CHECKOUT / "launch" / "clusters"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, without anything in it."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of shipped files of an installed package, without a checkout around it."""
    package = tmp_path / "site-packages" / "proma_megatron"
    (package / "shipped" / "configs").mkdir(parents=True)
    (package / "shipped" / "clusters").mkdir()
    (package / "shipped" / "configs" / "quickstart.yaml").write_text("name: of_the_wheel\n")
    (package / "shipped" / "clusters" / "modules.yaml").write_text("account: of_the_wheel\n")
    monkeypatch.setattr(shipped, "PACKAGE", package)
    return package / "shipped"


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "configs/quickstart.yaml"])
def test_a_name_is_the_configuration_of_the_checkout(name: str) -> None:
    assert find_config(Path(name)) == CONFIGS / "quickstart.yaml"
    assert load_config(Path(name)).name == "quickstart"


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "configs/quickstart.yaml"])
def test_a_name_is_the_configuration_of_the_wheel(name: str, wheel: Path) -> None:
    assert find_config(Path(name)) == wheel / "configs" / "quickstart.yaml"
    assert read_tree(Path(name)) == {"name": "of_the_wheel"}


def test_an_installed_project_named_configs_hides_nothing(wheel: Path) -> None:
    other = wheel.parents[1] / "configs"
    other.mkdir()
    (other / "quickstart.yaml").write_text("name: of_another_project\n")
    assert read_tree(Path("quickstart")) == {"name": "of_the_wheel"}


@pytest.mark.parametrize("name", ["modules", "modules.yaml", "launch/clusters/modules.yaml"])
def test_a_name_is_the_cluster_file(name: str, request: pytest.FixtureRequest) -> None:
    assert find_cluster(Path(name)) == CLUSTERS / "modules.yaml"
    assert load_cluster(Path(name)) == load_cluster(CLUSTERS / "modules.yaml")
    wheel = request.getfixturevalue("wheel")
    assert find_cluster(Path(name)) == wheel / "clusters" / "modules.yaml"


def test_every_shipped_file_is_found_by_its_stem() -> None:
    """Stems such as qwen3_0.6b_gsm8k have a dot in them."""
    assert sorted(CONFIGS.glob("*.yaml"))
    for path in CONFIGS.glob("*.yaml"):
        assert find_config(Path(path.stem)) == path
    for path in CLUSTERS.glob("*.yaml"):
        assert find_cluster(Path(path.stem)) == path


def test_the_base_of_a_shipped_file_is_beside_it() -> None:
    assert load_config(Path("compare")).rollout == load_config(Path("quickstart")).rollout


def test_a_file_that_is_there_comes_first(elsewhere: Path) -> None:
    for name in ("quickstart.yaml", "configs/quickstart.yaml"):
        (elsewhere / name).parent.mkdir(exist_ok=True)
        (elsewhere / name).write_text("name: mine\n")
        assert find_config(Path(name)) == Path(name)
        assert load_config(Path(name)).name == "mine"


def test_a_folder_of_that_name_hides_nothing(elsewhere: Path) -> None:
    (elsewhere / "quickstart").mkdir()
    assert find_config(Path("quickstart")) == CONFIGS / "quickstart.yaml"


@pytest.mark.parametrize(
    "path", ["quickest", "mine/quickstart.yaml", "/nowhere/quickstart.yaml", "../quickstart.yaml"]
)
def test_any_other_path_stays_and_the_error_names_it(path: str) -> None:
    assert find_config(Path(path)) == Path(path)
    with pytest.raises(ConfigError, match=f"config file {path} does not exist"):
        load_config(Path(path))


def test_an_unknown_cluster_stays_and_the_error_names_it() -> None:
    assert find_cluster(Path("nowhere")) == Path("nowhere")
    with pytest.raises(ConfigError, match="config file nowhere does not exist"):
        load_cluster(Path("nowhere"))


def test_a_base_is_relative_to_its_file_only(elsewhere: Path) -> None:
    (elsewhere / "mine.yaml").write_text("base: quickstart.yaml\n")
    with pytest.raises(ConfigError) as caught:
        load_config(Path("mine.yaml"))
    assert_names(caught, "quickstart.yaml", "does not exist")
