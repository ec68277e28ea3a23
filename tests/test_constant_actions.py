"""The baseline that holds one action plays what it says, and its result is the best action's."""

import json

import constant_actions
import pytest
import report
import torch


def test_the_best_action_is_written_where_reports_find_it(tmp_path, monkeypatch):
    paid = [[3.0, 1.0], [0.0, 9.0], [4.0, 4.0], [-1.0, 2.0], [0.0, 0.0], [1.0, 1.0]]

    def evaluate(network, args):
        """Return what a game pays, by the action that the network holds."""
        settings = (args.env_id, args.eval_episodes, args.eval_epsilon, args.seed)
        assert settings == ("Pong", 2, 0.25, 7)
        values = network.q_values(network(torch.rand(5, 4, 84, 84)))
        assert values.shape == (5, 6)
        (action,) = values.argmax(1).unique().tolist()
        return paid[action]

    monkeypatch.setattr(constant_actions.script, "evaluate", evaluate)
    flags = dict(env_id="Pong", seed=7, eval_episodes=2, eval_epsilon=0.25)
    args = constant_actions.Args(**flags, run_dir=tmp_path)
    constant_actions.main(args)
    result = json.loads((tmp_path / "Pong__constant__7" / "result.json").read_text())
    assert (result["args"]["action"], result["mean_return"]) == (1, 4.5)
    assert result["episode_returns"] == [0.0, 9.0]
    assert result["episode_returns_by_action"] == paid
    (run,) = report.read_runs([tmp_path]).to_dict("records")
    assert report.fixed_policy(run["args"]) == "constant"
    with pytest.raises(SystemExit, match="pass --overwrite"):
        constant_actions.main(args)

    args = constant_actions.Args(**flags, run_dir=tmp_path, actions=(3, 2), overwrite=True)
    constant_actions.main(args)
    result = json.loads((tmp_path / "Pong__constant__7" / "result.json").read_text())
    assert (result["args"]["action"], result["mean_return"]) == (2, 4.0)
    assert (result["actions"], result["episode_returns_by_action"]) == ([3, 2], [paid[3], paid[2]])


def test_one_action_plays_whole_games():
    """Pong's opponent wins 21 to 0 against a paddle that does nothing."""
    args = constant_actions.Args(env_id="Pong", eval_episodes=1)
    still = constant_actions.ConstantAction(0, 6)
    assert constant_actions.script.evaluate(still, args.settings) == [-21.0]


def test_what_cannot_be_is_told_before_the_games(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no such game"):
        constant_actions.Args(env_id="Pang")
    monkeypatch.setattr(constant_actions.script, "evaluate", None)
    with pytest.raises(SystemExit, match="Pong has the actions 0 to 5"):
        constant_actions.main(constant_actions.Args(env_id="Pong", actions=(6,), run_dir=tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        constant_actions.main(constant_actions.Args(env_id="Pong", run_dir=tmp_path / "file"))
