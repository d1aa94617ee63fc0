import json

import pytest

from cloud.training.config import DEFAULT_CONFIG, TrainingConfig, load_catalogue, load_config, load_mapping
from edge_agent.contract.errors import ConfigError
from edge_agent.contract.mapping import BoundMapping
from edge_agent.contract.signals import FAILURE_TYPES


def test_the_shipped_configuration_is_valid_and_names_every_failure_type():
    config = load_config(DEFAULT_CONFIG)
    assert set(config.lightgbm.type_features) == set(FAILURE_TYPES)
    assert (config.retraining.drift_alerts, config.retraining.max_age_days) == (3, 30.0)
    assert (config.retraining.new_samples, config.retraining.performance_drop) == (10_000, 0.1)
    assert config.window.frames == 300
    assert config.thresholds.decision.cooldown_s == 1800.0


def test_numbers_in_code_and_in_the_shipped_file_agree():
    shipped, default = load_config(DEFAULT_CONFIG), TrainingConfig()
    assert (shipped.window, shipped.split, shipped.labels) == (default.window, default.split, default.labels)
    assert (shipped.thresholds, shipped.retraining) == (default.thresholds, default.retraining)


@pytest.mark.parametrize(
    ("place", "key", "value", "says"),
    [
        ((), "sead", 1, "did you mean 'seed'"),
        (("lightgbm",), "learning_rat", 0.1, "did you mean 'learning_rate'"),
        (("window",), "frame", 300, "did you mean 'frames'"),
        (("thresholds", "decision"), "cooldown", 60, "did you mean 'cooldown_s'"),
        (("split",), "train", 0.9, "add up to 1"),
        (("autoencoder",), "hidden", "big", "Expected `int`"),
    ],
)
def test_a_typo_or_a_wrong_value_is_one_clear_line(tmp_path, place, key, value, says):
    document = json.loads(DEFAULT_CONFIG.read_text())
    section = document
    for name in place:
        section = section[name]
    section[key] = value
    path = tmp_path / "config.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=says) as error:
        load_config(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match="no_such"):
        load_config(DEFAULT_CONFIG.with_name("no_such.json"))


def test_the_default_mapping_fits_the_default_catalogue():
    config = load_config(DEFAULT_CONFIG)
    catalogue = load_catalogue(config, DEFAULT_CONFIG)
    mapping, name = load_mapping(config, DEFAULT_CONFIG)
    columns = ["time", *catalogue.scalar_names, *(f"{v.name}[{i}]" for v in catalogue.vectors for i in range(96))]
    bound = BoundMapping(mapping, catalogue, columns, name)
    assert bound.cells() == 96
    assert bound.missing() == ()
