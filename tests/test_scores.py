"""D4RL's reference scores are found under the names that Gymnasium, Minari, D4RL and files give to tasks."""

import numpy as np
import pytest

from ooo_rl.data.datasets.scores import MAZE2D_V0, REFERENCES, normalized_score, reference, scored

NAMES = {  # family -> how its tasks and datasets are called
    "halfcheetah": "halfcheetah-medium-v2 HalfCheetah-v5 mujoco/halfcheetah/expert-v0",
    "hopper": "hopper-medium-replay-v2 Hopper-v4 /home/ant/hopper_medium-v2.hdf5",
    "walker2d": "walker2d-random-v0",
    "ant": "Ant-v5",
    "antmaze": "antmaze-large-diverse-v2 D4RL/antmaze/umaze-v1 AntMaze_UMaze-v4",
    "kitchen": "kitchen-mixed-v0 FrankaKitchen-v1 D4RL/kitchen/complete-v2",
    "maze2d-umaze": "maze2d-umaze-v1 maze2d-umaze ooo/maze2d-umaze/noisy-v0 maze2d-umaze-sparse-v1.hdf5",
    "maze2d-large-dense": "maze2d-large-dense-v1",
    "maze2d-open": "maze2d-open-v0",
    "maze2d-open-dense": "maze2d-open-dense-v0 maze2d-open-dense maze2d-open-dense.hdf5",
    "door": "AdroitHandDoor-v1 door-human-v1 D4RL/door/human-v2 door-human-v1.hdf5",
    "pen": "AdroitHandPen-v1 D4RL/pen/cloned-v2",
    "hammer": "AdroitHandHammer-v1",
    "relocate": "relocate-expert-v1",
}


@pytest.mark.parametrize(
    ("name", "family"), [(name, family) for family, names in NAMES.items() for name in names.split()]
)
def test_names_of_many_styles_find_their_family(name, family):
    assert reference(name) == REFERENCES[family]


WITHOUT = [
    "point-mass-wall", "point-mass-wall-sparse", "AdroitHandDoorSparse-v1", "door-binary-v0", "Pendulum-v1",
    "door_human_replayed.npz", "/home/ant/log.npz", "/data/pen/log-v0", "~/hopper-v0", "../kitchen/log.HDF5",
    "hopper.h5", "CartPole-v1", "Humanoid-v5", "ooo/point-mass-wall/over-v0", "maze2d-eval-large-v1", "none",
    "", "ant-walk", "my_tasks:Hopper", "AntMaze_UMazeDense-v4", "maze2d-eval-umaze-v1",
    "bullet-halfcheetah-medium-v0",
]  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT)
def test_names_without_a_reference(name):
    assert reference(name) is None and normalized_score(name, 1.0) is None


def test_random_is_0_and_expert_100():
    np.testing.assert_allclose(normalized_score("hopper-medium-v2", REFERENCES["hopper"]), [0, 100])
    np.testing.assert_allclose(normalized_score("hopper-medium-v2", np.mean(REFERENCES["hopper"])), 50)
    assert normalized_score("D4RL/door/human-v2", 795.95) == pytest.approx(29.02, abs=0.01)


@pytest.mark.parametrize("kind", ["cumulative", "new"])
def test_the_score_of_the_kitchen_is_the_number_of_solved_sub_tasks(kind):
    new = np.array([0, 1, 0, 2, 0, 0, 1, 0, 0, 0.0])  # three in the first episode, one in the second
    episode = np.repeat([0, 1], [5, 5])
    so_far = np.concatenate([np.cumsum(new[:5]), np.cumsum(new[5:])])
    rewards = so_far if kind == "cumulative" else new
    assert scored("ooo/kitchen-complete/human-v0", rewards, episode).tolist() == [3, 1]
    assert scored("hopper-medium-v2", rewards, episode).tolist() == [rewards[:5].sum(), rewards[5:].sum()]
    assert normalized_score("kitchen-mixed", 3.0) == 75


PUBLISHED = {  # D4RL's references as its paper rounds them, apart from our table
    "halfcheetah": (-280.2, 12135.0), "hopper": (-20.3, 3234.3), "walker2d": (1.6, 4592.3), "ant": (-325.6, 3879.7),
    "pen": (96.3, 3076.8), "hammer": (-274.9, 12794.1), "door": (-56.5, 2880.6), "relocate": (-6.4, 4233.9),
    "kitchen": (0, 4), "antmaze": (0, 1), "maze2d-umaze": (23.85, 161.86), "maze2d-medium": (13.13, 277.39),
    "maze2d-large": (6.7, 273.99), "maze2d-open": (0.01, 20.66), "maze2d-open-dense": (11.18, 27.17),
}  # fmt: skip
PUBLISHED_V0 = {  # of maze2d's first version: sparse, dense
    "umaze": (0.94, 62.6, 23.25, 81.79), "medium": (5.77, 85.14, 19.48, 96.03), "large": (4.83, 191.99, 27.39, 215.1),
}  # fmt: skip


def test_references_are_the_published_ones():
    for family, published in PUBLISHED.items():
        np.testing.assert_allclose(REFERENCES[family], published, atol=0.051)


@pytest.mark.parametrize("size", list(PUBLISHED_V0))
def test_the_first_maze2d_has_references_of_its_own(size):
    for dense, published in (("", PUBLISHED_V0[size][:2]), ("-dense", PUBLISHED_V0[size][2:])):
        name = f"maze2d-{size}{dense}"
        file = f"maze2d-{size}{dense or '-sparse'}.hdf5"
        assert reference(f"{name}-v0") == reference(file) == MAZE2D_V0[f"{name}-v0"]
        np.testing.assert_allclose(reference(f"{name}-v0"), published, atol=0.006)
        assert (
            reference(name)
            == reference(f"{name}-v1")
            == reference(f"ooo/{name}/noisy-v0")
            == REFERENCES[name]
        )
