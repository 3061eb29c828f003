"""PPO's parts: take each out, or turn it, and look."""
import ppo
from learn.labs.lab import WORTH, changed, train_ppo
from measure.report import SERIES, read_metrics
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
    "Most of all it needs few passes over a rollout, at this learning rate. With 20 epochs instead "
    "of 2 (so ten times as many steps) the policy runs away from its own samples: KL "
    "{20 epochs[kl]} nats, true match {20 epochs[true_match]}, although {20 epochs[clipped]} of "
    "the tokens are clipped. Without clipping, these policies shrink to texts of a few tokens, and "
    "none parses. We had predicted that clipping holds; it only softens the fall. With 2 "
    "epochs few ratios leave the range, as predicted ({as it is[clipped]}); still, without "
    "clipping the KL is higher in every seed.\n\n"
    "How small a difference can these runs show? Whitening hardly changes the algorithm, and "
    "without it the truth of a seed changes by -0.07, +0.04 and 0.00. So a difference of less than "
    "0.07 in one seed says nothing. What is left: without a critic the truth is lower in every "
    "seed, by 0.08 to 0.17, more than we predicted. Part of that is λ, which without values is a "
    "discount of 0.95 a token: early tokens hardly see the score. With λ 1 no critic is still "
    "worse, by 0.05 to 0.13; compared with λ 1 *and* the critic, it is worse in two seeds of "
    "three. A rollout at 0.7 with an update at 1 is lower in every seed, by 0.03 to 0.10: bad, "
    "but not the worst. λ 0 has a lower reward and less KL in every seed. A critic on the policy's "
    "states explains less in every seed; what it does to the truth (-0.05, +0.00, -0.08), three "
    "seeds cannot tell, nor what λ 1 does. With both temperatures at 0.7 the reward and the KL are "
    "lower in every seed, and the greedy JDs are no worse.")
TABLE = WORTH | {"explained": "explained variance, iterations 2 to 4", "clipped": "clipped"}
NOTE = ("Explained variance is that of GAE's returns. They hold the critic's own later values, the "
        "more the smaller λ is: compare it only where λ is the same. *Clipped* is the share of "
        "tokens whose ratio left the range, over all iterations.")
AXES = 2


def measured(place, *flags):
    found = train_ppo(place, *flags)
    metrics = read_metrics(place.run / "ppo" / "metrics.csv")
    explained = metrics["explained_variance"][1:4]
    return found | {"explained": float(explained.mean()),
                    "clipped": float(metrics["clip_frac"].mean())}


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
