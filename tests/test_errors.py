import pickle

import pytest

from videogru import errors


def test_message_says_where_what_and_next() -> None:
    error = errors.SourceError("holds no frames", where="clip.mp4", hint="Remove it.")
    assert str(error) == "clip.mp4: holds no frames\n  Remove it."


@pytest.mark.parametrize("kind", [errors.SourceError, errors.ConfigError, errors.Interrupted])
def test_errors_survive_the_way_from_a_worker(kind: type[errors.VideogruError]) -> None:
    error = pickle.loads(pickle.dumps(kind("what", where="where", hint="hint")))
    assert type(error) is kind
    assert (error.what, error.where, error.hint) == ("what", "where", "hint")


def test_exit_codes() -> None:
    assert [kind("x").exit_code for kind in (errors.ConfigError, errors.SourceError, errors.Interrupted)] == [2, 3, 130]
