"""The list of mutants.py, as far as it can be looked at without running it. In a file of its own:
it fails for any change of a line in the list, and would hide that no other test does."""
import mutants


def test_the_list_of_mutants_fits_the_project():
    assert list(mutants.stale()) == []
    broken = {statement for of_a_test in mutants.MUTANTS.values() for statement, *_ in of_a_test}
    assert broken == set(range(35))
