"""PPO's parts: take each out, or turn it, and look."""
import ppo
from learn.labs.lab import WORTH, changed, train_ppo
from measure.report import SERIES
from model import generate

QUESTION = "Which parts of PPO does it need here?"
PREDICTION = (
    "The critic matters most: without one, and with one that reads the policy's states, the true "
    "match ends 0.03 to 0.05 lower. λ 0 is a little worse than 0.95, λ 1 no different. Without "
    "clipping nothing changes, since the ratios hardly leave the range; with 20 epochs clipping "
    "holds, and the truth ends lower than with 2. Without whitening the steps of Adam are the same "
    "but for the mean, so little changes. A rollout at temperature 0.7 with an update at 1 is the "
    "worst of all: its samples are not the policy's.")
SAW = (
    "Most of all it needs few passes over a rollout. With 20 epochs the policy runs away from its "
    "own samples: KL {20 epochs[kl]} nats, and the truth falls to {20 epochs[true_match]}, in "
    "spite of clipping. Without clipping no JD parses any more. So we were wrong: clipping softens "
    "the fall, it does not hold. With 2 epochs the reward is the same without clipping, but the "
    "truth is about 0.08 lower in two of three seeds. The critic comes next, and it is worth "
    "more than we thought: without one the truth is lower in every seed "
    "({no critic[true_match]}; with λ 1 {no critic, λ 1[true_match]}). A critic on the policy's "
    "states explains half as much and is lower in two seeds of three. λ 0 is lower in every seed, "
    "λ 1 in two. (With λ 0 the returns are made of the critic's own values, so its explained "
    "variance means nothing.) Whitening changes nothing that we can see. A rollout at 0.7 with an "
    "update at 1 is lower in every seed, but far from the worst. Both at 0.7 spend less KL and "
    "give better greedy JDs in every seed, and slightly worse samples at 1. The seeds themselves "
    "are 0.07 apart, so three of them cannot tell a difference of 0.03.")
TABLE = WORTH | {"explained": "explained variance, iterations 2 to 4"}
AXES = 2


def measured(place, *flags):
    found = train_ppo(place, *flags)
    explained = found["curve"]["explained_variance"][1:4]
    return found | {"explained": sum(explained) / len(explained)}


def without_whitening(place):
    with changed(ppo, whiten=lambda x, mask: x * mask):
        return measured(place)


def without_critic(place, *flags):
    """Without values, λ below 1 discounts the score: so λ 1 is tried, too."""
    with changed(ppo.Critic, values=lambda self, sums: sums[..., 0] * 0):
        return measured(place, *flags)


def critic_on_policy(place):
    """The critic reads the policy's states, as some code has it, not the reward model's."""
    roll_out, score_responses = ppo.roll_out, ppo.score_responses

    def changed_roll_out(policy, *rest):
        def score_with_policy(reward_model, part, *more):
            scores, finished, _ = score_responses(reward_model, part, *more)
            states = ppo.response_states(policy.model, part).float()            # [tokens, C]
            return scores, finished, ppo.to_rows(states, part).cumsum(1)
        with changed(ppo, score_responses=score_with_policy):
            return roll_out(policy, *rest)
    with changed(ppo, roll_out=changed_roll_out):
        return measured(place)


def colder_rollout(place):
    def colder(lm, prompts, n, temperature, **more):
        return generate(lm, prompts, n, 0.7 * temperature, **more)
    with changed(ppo, generate=colder):
        return measured(place)


ARMS = {
    "as it is": measured,
    "no clipping": lambda place: measured(place, "--clip", 1e9),
    "20 epochs": lambda place: measured(place, "--ppo-epochs", 20),
    "20 epochs, no clipping": lambda place: measured(place, "--ppo-epochs", 20, "--clip", 1e9),
    "no whitening": without_whitening,
    "no critic": without_critic,
    "no critic, λ 1": lambda place: without_critic(place, "--lam", 1),
    "critic on the policy's states": critic_on_policy,
    "rollout at 0.7, update at 1": colder_rollout,
    "both at 0.7 (measured at 1)": lambda place: measured(place, "--temperature", 0.7),
    "λ 0": lambda place: measured(place, "--lam", 0),
    "λ 1": lambda place: measured(place, "--lam", 1),
}
SMOKE = ("as it is", "no whitening", "no critic", "critic on the policy's states",
         "rollout at 0.7, update at 1")


def draw(found, axes):
    """Reward and truth over the iterations, seed 0."""
    shown = {"as it is": SERIES[2], "no critic": SERIES[1], "critic on the policy's states":
             SERIES[3], "20 epochs": SERIES[0], "20 epochs, no clipping": SERIES[5],
             "rollout at 0.7, update at 1": SERIES[4]}
    for row in found:
        if row["seed"] == 0 and row["arm"] in shown:
            for ax, name in zip(axes, ("reward", "true_match")):
                y = row["curve"][name]
                ax.plot(range(1, len(y) + 1), y, color=shown[row["arm"]], lw=1.2,
                        label=row["arm"] if name == "reward" else None)
    for ax, name in zip(axes, ("reward", "true match")):
        ax.set_xlabel("iteration")
        ax.set_ylabel(name)
    axes[0].figure.legend(loc="outside upper center", ncols=2)
