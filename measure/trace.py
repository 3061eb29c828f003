"""PPO under the lens: an iteration that was kept is done again, and one of its texts is shown token
by token.

    python girl.py trace --run RUN [--iteration N] [--episode K] [--cv FILE]

`ppo --keep` says how many iterations are kept: of each the state before it, which is policy,
critic, optimizer and beta. Prompts and samples follow from the seed, so the iteration can be done
again, with the functions that training uses. On the CPU of the same machine and with the same
number of threads it gives the figures in its row of metrics.csv, bit for bit. With `--cv` the text
of that file takes the place of the episode's CV: what would PPO have made of it?

Shapes: R tokens of the episode.
"""
import csv
from dataclasses import fields
from typing import NamedTuple

import torch

import ppo
from plumbing.files import BadInput, read_checked
from plumbing.inputs import inputs_of, need
from plumbing.stage import (KEPT, autocast, check_folder, differences, generator, machine,
                            read_summary, restore)

END = "[end]"               # how end-of-text is shown


class Trace(NamedTuple):
    """One episode of one iteration. A column is a list of R numbers."""
    iteration: int          # counted from 1
    iterations: int         # of the run
    episode: int
    cv: str
    jd: str
    tokens: list            # R texts
    columns: dict           # {name: column}, see columns_of
    ratios: list            # columns: before the update, and after each of its optimizer steps
    clip: float
    beta: float
    score: float
    true_match: float | None
    log: dict               # the figures of the whole iteration
    row: dict               # the same figures in metrics.csv
    machine: list           # differences of this machine from the one that trained

    def differences(self):
        """(name, figure, figure in metrics.csv) of each that is not the same, bit for bit."""
        return [(name, value, self.row.get(name)) for name, value in self.log.items()
                if value != self.row.get(name)]


def read_row(run, iteration):
    """The row of this iteration in metrics.csv, without its warning: {name: number or None}."""
    with (run / "ppo" / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            if int(row["iteration"]) == iteration:
                row.pop("kl_fault", None)
                return {name: float(x) if x else None for name, x in row.items()}
    raise BadInput(f"{run / 'ppo' / 'metrics.csv'}: has no iteration {iteration}")


def flags_of_run(run, folder):
    """The flags and the seed that PPO ran with. Refuses other data or models than it had."""
    need(run, "ppo")
    check_folder(run / "ppo")
    if not (folder / "train.jsonl").is_file():
        raise BadInput(f"{folder / 'train.jsonl'}: no such file; give the folder of the data of "
                       "this run with --data")
    summary = read_summary(run / "ppo")
    asked = summary["asked"]
    if others := differences(summary["inputs"], inputs_of(run, folder, "ppo")):
        raise BadInput(f"{run / 'ppo'}: was trained with another {others[0][0]}; give the folder "
                       "of its data with --data")
    known = {f.name for f in fields(ppo.PPOFlags)}
    flags = ppo.PPOFlags(**{name: value for name, value in asked.items() if name in known})
    return flags, asked["seed"]


def columns_of(rollout, k, flags):
    """What training computed for each token of episode k: {name: column}."""
    one = rollout.rows([k])
    mask = one.mask
    kl = ppo.k1(one.logp, one.ref_logp) * mask                                      # [1, R]
    advantages = ppo.gae(one.rewards, one.values, mask, flags.gamma, flags.lam)     # [1, R]
    returns = ppo.returns_to_go(one.rewards, mask, flags.gamma)                     # [1, R]
    columns = {
        "log_pi": one.logp,
        "log_pi_ref": one.ref_logp,
        "kl": kl,
        "reward": one.rewards,
        "value": one.values,
        "delta": ppo.gae(one.rewards, one.values, mask, flags.gamma, 0.0),          # lambda 0
        "advantage": advantages,
        "whitened": one.advantages,
        "lambda_return": advantages + one.values,
        "return": returns}
    return {name: x[mask].tolist() for name, x in columns.items()}


class RolledOut(NamedTuple):
    """An iteration before its update."""
    iteration: int
    cvs: list
    rollout: ppo.Rollout
    log: dict
    generator: torch.Generator      # the update goes on with it
    machine: list                   # differences of this machine from the one that trained


class Replay:
    """The iterations of a finished PPO that were kept, to do them again. `true_match(cv, jd)`: a
    number, or None."""

    def __init__(self, run, folder, device, true_match=None):
        self.run, self.device, self.true_match = run, device, true_match
        self.flags, self.seed = flags_of_run(run, folder)
        self.kept = sorted(int(path.stem) for path in (run / "ppo" / KEPT).glob("*.json")
                           if path.stem.isdecimal())
        if not self.kept:
            raise BadInput(f"{run / 'ppo' / KEPT}: no iteration was kept, by an earlier version or "
                           f"with --keep 0; delete {run / 'ppo'} and run  python girl.py ppo --run "
                           f"{run} --keep 5")
        self.policy, self.reward_model, self.codec, self.cvs = ppo.load(run, folder, device)
        prepared = ppo.prepare(self.policy, self.reward_model, self.flags)
        self.reference, self.optimizer, self.critic = prepared

    def restore(self, iteration):
        """The state before this iteration. Returns its beta, and in what this machine differs from
        the one that kept it."""
        if iteration not in self.kept:
            raise BadInput(f"trace: iteration {iteration} was not kept; the kept ones are "
                           f"{', '.join(map(str, self.kept))} (see --keep of ppo)")
        remedy = f"delete {self.run / 'ppo'} and run the stage again"
        path = self.run / "ppo" / KEPT / f"{iteration}.json"
        kept = read_checked(path, remedy)
        restore(path.with_suffix(".safetensors"), kept["sha256"],
                {"policy": self.policy, "critic": self.critic}, [self.optimizer], remedy)
        return kept["numbers"]["beta"], differences(kept["machine"], machine())

    def roll_out(self, iteration, episode=0, cv=None):
        """The rollout of this iteration, as in ppo.train. `cv`: a text that takes the place of the
        episode's CV."""
        i, (beta, other_machine) = iteration - 1, self.restore(iteration)
        rng = generator(self.seed, "ppo", i)
        chosen = ppo.draw_cvs(self.cvs, self.flags, rng)
        if episode >= len(chosen):
            raise BadInput(f"trace: --episode {episode} must be at most {len(chosen) - 1}; the "
                           f"iteration has {len(chosen)} episodes, counted from 0")
        if cv and self.flags.advantages != "gae":
            raise BadInput("trace: --cv needs a run with --advantages gae; here each text is "
                           "compared with others for the same CV")
        chosen[episode] = cv or chosen[episode]
        prompts = [self.codec.prompt(cv) for cv in chosen]
        rollout, log = ppo.roll_out(
            self.policy, self.reference, self.reward_model, self.critic, prompts, self.codec,
            self.flags, beta, generator(self.seed, "ppo-sample", i, device=self.device),
            self.device)
        return RolledOut(iteration, chosen, rollout, log, rng, other_machine)

    def update(self, rolled_out, episode=0):
        """The update that follows, as in ppo.train: the Trace of one of its episodes."""
        iteration, cvs, rollout, log, rng, other_machine = rolled_out
        ratios = [self.ratios(rollout, episode)]
        self.optimizer.param_groups[0]["lr"] = ppo.learning_rate(iteration - 1, self.flags)
        hook = self.optimizer.register_step_post_hook(
            lambda *_: ratios.append(self.ratios(rollout, episode)))
        log |= ppo.update(self.policy, self.optimizer, rollout, self.flags, rng, self.device)
        hook.remove()
        responses = rollout.responses()
        # GRPO's rewards hold no price of the KL: it is in the loss.
        beta = 0.0 if self.flags.advantages == "grpo" else log["beta"]
        texts, matches = list(map(self.codec.text, responses)), [None] * len(cvs)
        if self.true_match:
            matches = list(map(self.true_match, cvs, texts))
        log["true_match"] = sum(matches) / len(matches) if self.true_match else None
        return Trace(
            iteration, self.flags.iterations, episode, cvs[episode], texts[episode],
            self.pieces(responses[episode]), columns_of(rollout, episode, self.flags), ratios,
            self.flags.clip, beta, float(rollout.scores[episode]), matches[episode], log,
            read_row(self.run, iteration), other_machine)

    def trace(self, iteration, episode=0, cv=None):
        """Do a whole iteration again: the Trace of one of its episodes."""
        return self.update(self.roll_out(iteration, episode, cv), episode)

    def pieces(self, tokens):
        """The text of each token. Decoded one by one, a token could lose its space, or its half of
        a character: that comes with the token that completes it."""
        decode, shown, pieces = self.codec.tokenizer.decode, "", []
        for i, t in enumerate(tokens):
            text = decode(tokens[:i + 1], skip_special_tokens=False)
            complete = text.rstrip("\ufffd") if i + 1 < len(tokens) else text
            pieces.append(END if t == self.codec.eos else complete[len(shown):])
            shown = complete
        return pieces

    @torch.no_grad()
    def ratios(self, rollout, episode):
        """The ratio of each token of an episode, with the policy as it is now."""
        one = rollout.rows([episode])
        with autocast(self.device):
            logp, _ = ppo.evaluate_policy(self.policy, one, self.flags.temperature)  # [1, R]
        return (logp - one.logp)[one.mask].exp().tolist()


# --------------------------------------------------------------------------------------- printing
TITLES = {"log_pi": "log π", "log_pi_ref": "log π_ref", "kl": "KL", "reward": "reward",
          "value": "value", "delta": "δ", "advantage": "A", "whitened": "A used",
          "lambda_return": "A + value", "return": "return"}


def table(t):
    """The lines of the table: a line for each token."""
    steps = len(t.ratios) - 1
    lines = [f"{'token':<18}" + "".join(f"{TITLES[name]:>11}" for name in t.columns)
             + "   ratio before the update, and after each of its "
             + f"{steps} steps; *: outside 1 ± {t.clip:g}"]
    for r, token in enumerate(t.tokens):
        cells = "".join(f"{column[r]:>11.3f}" for column in t.columns.values())
        ratios = "".join(mark(column[r], t.clip) for column in t.ratios)
        lines.append(f"{repr(token)[1:-1][:18]:<18}{cells}   {ratios}")
    return lines


def mark(ratio, clip):
    return f"{ratio:5.2f}{'*' if abs(ratio - 1) > clip else ' '} "


def sums(t):
    """What adds up, in lines."""
    kl, rewards = sum(t.columns["kl"]), sum(t.columns["reward"])
    return [f"The rewards add up to {rewards:+.4f}: score {t.score:+.4f} - "
            f"beta {t.beta:g} x KL {kl:.4f} = {t.score - t.beta * kl:+.4f}.",
            "A + value is GAE's estimate of what the text still brings; the return is what it "
            "brought."]


def same_as_logged(t):
    """Does the iteration give the figures of metrics.csv? In one line."""
    what = f"Iteration {t.iteration} of {t.iterations}, done again,"
    if found := t.differences():
        why = "Another machine, other code, or sums on CUDA, which have no fixed order?"
        if t.machine:
            name, was, now = t.machine[0]
            why = f"It was kept with {name} {was}; now it is {now}."
        name, value, logged = found[0]
        return f"{what} differs from metrics.csv: {name} {value} instead of {logged}. {why}"
    truth = t.log["true_match"]
    shown = "" if truth is None else f", true match {truth:.4f}"
    return (f"{what} has the figures of metrics.csv, bit for bit, over all its texts: reward "
            f"{t.log['reward']:+.4f}, KL {t.log['kl']:.4f}{shown}, and the others.")


def show(t, own_cv):
    """Print a trace. `own_cv`: its CV is not the one of training."""
    truth = "" if t.true_match is None else f", true match {t.true_match:.3f}"
    print(f"{t.cv}\n->\n{t.jd}\n\nscore {t.score:+.3f}{truth}\n")
    print(*table(t), "", *sums(t), sep="\n")
    if own_cv:
        print(f"Iteration {t.iteration} of {t.iterations}, with your CV in place of episode "
              f"{t.episode}'s.")
    else:
        print(same_as_logged(t))
