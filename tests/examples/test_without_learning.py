"""That the reward rises by learning: it does not without."""


def test_without_learning_there_is_no_rise(run):
    done = run("policy_gradient.py", "--worker", "hf", "--steps", 10, "--learning-rate", 0)
    assert done.code == 1
    assert abs(done.rise()) < 0.2
