"""D4RL's reference scores are found under the names by which Gymnasium, Minari, D4RL and files call their tasks."""

import numpy as np
import pytest

from data.scores import REFERENCES, normalized_score, reference


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("halfcheetah-medium-v2", "halfcheetah"), ("HalfCheetah-v5", "halfcheetah"), ("mujoco/halfcheetah/expert-v0", "halfcheetah"),
        ("hopper-medium-replay-v2", "hopper"), ("Hopper-v4", "hopper"), ("walker2d-random-v0", "walker2d"), ("Ant-v5", "ant"),
        ("antmaze-large-diverse-v2", "antmaze"), ("D4RL/antmaze/umaze-v1", "antmaze"), ("AntMaze_UMaze-v4", "antmaze"),
        ("kitchen-mixed-v0", "kitchen"), ("FrankaKitchen-v1", "kitchen"), ("D4RL/kitchen/complete-v2", "kitchen"),
        ("maze2d-umaze-v1", "maze2d-umaze"), ("maze2d-large-dense-v1", "maze2d-large-dense"), ("maze2d-open-v0", "maze2d-open"),
        ("AdroitHandDoor-v1", "door"), ("door-human-v1", "door"), ("D4RL/door/human-v2", "door"), ("door_human_replayed.npz", "door"),
        ("AdroitHandPen-v1", "pen"), ("D4RL/pen/cloned-v2", "pen"), ("AdroitHandHammer-v1", "hammer"), ("relocate-expert-v1", "relocate"),
    ],
)  # fmt: skip
def test_names_of_many_styles_find_their_family(name, family):
    assert reference(name) == REFERENCES[family]


@pytest.mark.parametrize(
    "name",
    ["point-mass-wall", "point-mass-wall-sparse", "AdroitHandDoorSparse-v1", "door-binary-v0", "Pendulum-v1", "CartPole-v1", "Humanoid-v5",
     "ooo/point-mass-wall/over-v0", "maze2d-open-dense-v0", "none", ""],
)  # fmt: skip
def test_names_without_a_reference(name):
    assert reference(name) is None and normalized_score(name, 1.0) is None


def test_random_is_0_and_expert_100():
    np.testing.assert_allclose(normalized_score("hopper-medium-v2", REFERENCES["hopper"]), [0, 100])
    np.testing.assert_allclose(normalized_score("hopper-medium-v2", np.mean(REFERENCES["hopper"])), 50)
    assert normalized_score("D4RL/door/human-v2", 795.95) == pytest.approx(29.02, abs=0.01)
