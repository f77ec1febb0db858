"""The subnets of a run, found by its own images."""

import numpy as np
import sklearn.cluster

from ftwt_jax.budget.subnets import SubnetFinder
from ftwt_jax.training.run import load_run


def test_images_are_grouped_once_for_all_budgets(tiny_subnets, monkeypatch):
    fits, fit = [], sklearn.cluster.KMeans.fit

    def counting(self, *arguments, **options):
        fits.append(self.n_clusters)
        return fit(self, *arguments, **options)

    monkeypatch.setattr(sklearn.cluster.KMeans, "fit", counting)
    run = load_run(str(tiny_subnets[0]))
    finder = SubnetFinder(run, run.trained("baseline"), run.config.gates.r, "targets")
    several = [finder.group(budget, count=3, multiple=1) for budget in (0.3, 0.5, 0.3)]
    alone = SubnetFinder(run, run.trained("baseline"), run.config.gates.r, "targets").group(0.5, 3, 1)
    assert fits == [3, 3]
    for name, mask in alone.masks.items():
        np.testing.assert_array_equal(several[1].masks[name], mask)
        np.testing.assert_array_equal(several[0].masks[name], several[2].masks[name])
    np.testing.assert_array_equal(several[1].assignment, alone.assignment)
    assert several[0].macs_reduction < several[1].macs_reduction
