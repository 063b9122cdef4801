"""Generated puzzles against plain references: every solution of a sudoku, every path of a maze, sums of bits."""

import itertools
import random
import time

import pytest

from llada_trm_hf.cli.main import main
from llada_trm_hf.data import load_reasoning_dataset, mazes, prefix_sums, sudoku_guesses, sudoku_puzzles
from llada_trm_hf.data.distinct_problems import split_of
from llada_trm_hf.data.generated_problems import GENERATORS, GeneratorOptions, options_taken
from llada_trm_hf.data.sudoku import _PUZZLES_OF_4, _split_key
from llada_trm_hf.recipes.run_setup import DataArguments, train_and_save

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}


def is_solution(grid, size):
    """Whether every row, column and box has every digit."""
    height, width = BOXES[size]
    rows = [grid[i : i + size] for i in range(0, size * size, size)]
    columns = ["".join(row[c] for row in rows) for c in range(size)]
    boxes = [
        "".join(rows[r + i][c : c + width] for i in range(height))
        for r in range(0, size, height)
        for c in range(0, size, width)
    ]
    digits = [str(d) for d in range(1, size + 1)]
    return len(grid) == size * size and all(sorted(unit) == digits for unit in rows + columns + boxes)


def all_grids_of_4():
    rows = ["".join(row) for row in itertools.permutations("1234")]
    grids = ("".join(four) for four in itertools.product(rows, repeat=4))
    return [grid for grid in grids if is_solution(grid, 4)]


GRIDS_OF_4 = all_grids_of_4()


def solutions(puzzle, size):
    """All of them, by trying every digit in every empty cell, one cell after the other."""
    cell = puzzle.find(".")
    if cell < 0:
        return [puzzle] if is_solution(puzzle, size) else []
    height, width = BOXES[size]
    row, column = divmod(cell, size)
    top, left = row // height * height, column // width * width
    seen = {puzzle[row * size + c] for c in range(size)} | {puzzle[r * size + column] for r in range(size)}
    seen |= {puzzle[r * size + c] for r in range(top, top + height) for c in range(left, left + width)}
    tried = [str(d) for d in range(1, size + 1) if str(d) not in seen]
    return [found for d in tried for found in solutions(puzzle[:cell] + d + puzzle[cell + 1 :], size)]


def agrees(puzzle, grid):
    return all(given in (".", digit) for given, digit in zip(puzzle, grid, strict=True))


@pytest.mark.parametrize(
    "size, clues, number", [(4, None, 300), (4, 4, 100), (6, None, 100), (6, 10, 30), (9, 30, 10)]
)
def test_sudokus_have_exactly_one_solution(size, clues, number):
    for problem in sudoku_puzzles(number, size, clues, seed=1):
        puzzle, answer = problem["prompt"].removesuffix("="), problem["answer"]
        assert problem["prompt"] == puzzle + "=" and problem["reasoning"] == ""
        assert is_solution(answer, size) and agrees(puzzle, answer)
        if size == 4:
            assert [grid for grid in GRIDS_OF_4 if agrees(puzzle, grid)] == [answer]
        assert solutions(puzzle, size) == [answer]
        if clues is not None:
            assert size * size - puzzle.count(".") == clues


def test_the_known_numbers_of_4x4_puzzles():
    """Counted anew: a set of cells will do if every other solution differs from this one in one of them."""
    by_clues = dict.fromkeys(range(17), 0)
    # Relabelling the digits changes nothing: of the 24 grids that differ by it, one is enough.
    for grid in (grid for grid in GRIDS_OF_4 if grid.startswith("1234")):
        others = [sum(1 << i for i in range(16) if grid[i] != other[i]) for other in GRIDS_OF_4 if other != grid]
        others = [
            cells for cells in set(others) if not any(fewer != cells and fewer & cells == fewer for fewer in others)
        ]
        for cells in range(2**16):
            if all(cells & differs for differs in others):
                by_clues[cells.bit_count()] += 24
    assert {clues: number for clues, number in by_clues.items() if 4 <= clues < 16} == _PUZZLES_OF_4
    assert not any(by_clues[clues] for clues in range(4))


def singles_only(puzzle, size):
    """The grid after filling in the only candidate of a cell and the only place in a unit, as sets of candidates."""
    height, width = BOXES[size]
    cells = range(size * size)
    peers = {
        a: {
            b
            for b in cells
            if b != a
            and (
                a // size == b // size
                or a % size == b % size
                or (a // size // height, a % size // width) == (b // size // height, b % size // width)
            )
        }
        for a in cells
    }
    units = [[c for c in cells if key(c) == k] for key in (
        lambda c: c // size, lambda c: c % size, lambda c: c // size // height * size + c % size // width
    ) for k in {key(c) for c in cells}]  # fmt: skip
    candidates = [set("123456789"[:size]) if puzzle[c] == "." else {puzzle[c]} for c in cells]
    before = None
    while before != candidates:
        before = [set(some) for some in candidates]
        for c in cells:
            if len(candidates[c]) == 1:
                for peer in peers[c]:
                    candidates[peer] -= candidates[c]
        for unit, digit in itertools.product(units, "123456789"[:size]):
            places = [c for c in unit if digit in candidates[c]]
            if len(places) == 1:
                candidates[places[0]] = {digit}
    return candidates


def plain_guesses(puzzle, size):
    candidates = singles_only(puzzle, size)
    if not all(candidates):
        return 0
    open_cells = [c for c in range(size * size) if len(candidates[c]) > 1]
    if not open_cells:
        return 0
    cell = min(open_cells, key=lambda c: (len(candidates[c]), c))
    tried = [puzzle[:cell] + digit + puzzle[cell + 1 :] for digit in sorted(candidates[cell])]
    return len(tried) + sum(plain_guesses(guessed, size) for guessed in tried)


def test_guesses_are_those_of_a_plain_solver():
    puzzles = [problem["prompt"][:-1] for problem in sudoku_puzzles(15, 6, 9, seed=2)]
    puzzles += [problem["prompt"][:-1] for problem in sudoku_puzzles(4, 9, [23, 25], [1, 30], seed=2)]
    graded = [sudoku_guesses(puzzle) for puzzle in puzzles]
    assert graded == [plain_guesses(puzzle, int(len(puzzle) ** 0.5)) for puzzle in puzzles]
    assert all(1 <= guesses <= 30 for guesses in graded[15:])
    # One of the hardest there is, by Arto Inkala, and one that singles solve.
    hard = "8..........36......7..9.2...5...7.......457.....1...3...1....68..85...1..9....4.."
    assert sudoku_guesses(hard) > 30
    easy = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
    assert sudoku_guesses(easy) == sudoku_guesses(easy.replace(".", "0") + "=") == 0


@pytest.mark.parametrize(
    "puzzle, named",
    [
        ("1234", "16, 36 or 81 cells; got 4"),
        ("5" + "." * 15, "a digit from 1 to 4, or . or 0 for none; got '5'"),
        ("." * 16, "several solutions"),
        ("11" + "." * 14, "no solution"),
        ("", "got 0"),
    ],
)
def test_what_is_no_sudoku_is_refused(puzzle, named):
    with pytest.raises(ValueError, match=named):
        sudoku_guesses(puzzle)


# --- Splits ---


def symmetric(grid, generator):
    """A 9x9 grid with its digits relabelled, its bands, stacks, rows and columns exchanged, perhaps transposed."""
    rows = [grid[i : i + 9] for i in range(0, 81, 9)]
    for _ in range(2):
        bands = generator.sample(range(3), 3)
        rows = [rows[3 * band + row] for band in bands for row in generator.sample(range(3), 3)]
        rows = ["".join(column) for column in zip(*rows, strict=True)]
    if generator.random() < 0.5:
        rows = ["".join(column) for column in zip(*rows, strict=True)]
    return "".join(rows).translate(str.maketrans("123456789", "".join(generator.sample("123456789", 9))))


def test_no_symmetry_takes_a_grid_to_the_other_split():
    generator = random.Random(0)
    different = set()
    for split in ("train", "test"):
        for problem in sudoku_puzzles(10, 9, 40, split=split, seed=5):
            keys = {_split_key(symmetric(problem["answer"], generator)) for _ in range(20)}
            assert keys == {_split_key(problem["answer"])}
            assert {split_of(key) for key in keys} == {split}
            different |= keys
    assert len(different) == 20  # or all would be in one split, which no symmetry leaves either


def test_splits_are_disjoint():
    def made(function, split, *args, **kwargs):
        return [list(function(*args, split=split, seed=seed, **kwargs)) for seed in range(2)]

    for function, number, options, what in (
        (sudoku_puzzles, 600, {"puzzle_size": 4}, "prompt"),
        (sudoku_puzzles, 60, {"puzzle_size": 6}, "answer"),
        (prefix_sums, 60, {"num_terms": 10}, "prompt"),
    ):
        train, test = made(function, "train", number, **options), made(function, "test", number, **options)
        sets = [{problem[what] for problems in made for problem in problems} for made in (train, test)]
        assert sets[0].isdisjoint(sets[1]) and train[0] != train[1]
        for problems in (*train, *test):
            assert len({problem["prompt"] for problem in problems}) == number


def turned(grid, size):
    """The eight ways to turn and mirror a grid, cell by cell."""
    last = size - 1
    ways = [
        lambda r, c: (r, c),
        lambda r, c: (c, last - r),
        lambda r, c: (last - r, last - c),
        lambda r, c: (last - c, r),
    ]
    for way in ways:
        for mirror in (False, True):
            places = (way(r, last - c if mirror else c) for r in range(size) for c in range(size))
            yield "".join(grid[r * size + c] for r, c in places)


def test_no_maze_is_in_both_splits_turned_or_mirrored():
    """Of 3x3 rooms there are so few mazes that nearly all of them are made."""
    walls = {}
    for split, number in (("train", 2000), ("test", 150)):
        grids = [problem["prompt"][:-1] for problem in mazes(number, 5, split)]
        walls[split] = {grid.replace("S", ".").replace("G", ".") for grid in grids}
    assert len(walls["train"]) > 100 and len(walls["test"]) > 10
    assert not walls["test"] & {way for grid in walls["train"] for way in turned(grid, 5)}


def test_a_tenth_is_the_test_split():
    split_names = [split_of(str(number)) for number in range(10_000)]
    assert 900 < split_names.count("test") < 1100 and split_names.count("train") == 10_000 - split_names.count("test")


# --- Mazes and sums ---


def paths(grid, size, cell, visited):
    """Every way to the goal that enters no cell twice, by trying."""
    if grid[cell] == "G":
        yield visited
        return
    row, column = divmod(cell, size)
    for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
        if 0 <= r < size and 0 <= c < size and grid[r * size + c] != "#" and r * size + c not in visited:
            yield from paths(grid, size, r * size + c, [*visited, r * size + c])


@pytest.mark.parametrize("size", [5, 7, 11])
def test_mazes_have_one_shortest_path_and_it_is_marked(size):
    longer = 0
    for problem in mazes(60, size, seed=3):
        grid, answer = problem["prompt"].removesuffix("="), problem["answer"]
        assert len(grid) == len(answer) == size * size and problem["reasoning"] == ""
        assert set(grid) <= set("#.SG") and grid.count("S") == grid.count("G") == 1
        start = grid.index("S")
        found = sorted(paths(grid, size, start, [start]), key=len)
        assert len(found[0]) > size - 1 and [len(path) for path in found].count(len(found[0])) == 1
        longer += len(found) > 1
        marked = "".join("*" if cell in found[0][1:-1] else grid[cell] for cell in range(size * size))
        assert answer == marked
    assert longer > 10  # some have detours, or there would be nothing to choose


def test_prefix_sums_are_parities():
    for problem in prefix_sums(100, 17):
        bits = [int(bit) for bit in problem["prompt"].removesuffix("=")]
        assert len(bits) == 17 and problem["answer"] == "".join(str(sum(bits[: i + 1]) % 2) for i in range(17))


# --- As datasets ---

SMALL = {"sudoku": {"puzzle_size": 4}, "maze": {"puzzle_size": 7}, "prefix_sum": {"num_terms": 9}}
FUNCTIONS = {"sudoku": sudoku_puzzles, "maze": mazes, "prefix_sum": prefix_sums}


@pytest.mark.parametrize("name", SMALL)
def test_slices_and_streams_are_the_same_problems(name):
    options = SMALL[name]
    everything = list(FUNCTIONS[name](12, split="test", seed=3, **options))
    assert everything == list(FUNCTIONS[name](12, split="test", seed=3, **options))
    assert everything != list(FUNCTIONS[name](12, split="test", seed=4, **options))
    for split, part in (("test[:12]", slice(None)), ("test[5:9]", slice(5, 9))):
        for streaming in (False, True):
            rows, response = load_reasoning_dataset(name, split, seed=3, streaming=streaming, **options)
            assert list(rows) == everything[part] and response == "{answer}"
            assert list(rows) == everything[part]  # read again


def test_options_reach_the_problems():
    for num_clues in (28, [28], [28, 28]):
        rows, _ = load_reasoning_dataset("sudoku", "test[:2]", puzzle_size=9, num_clues=num_clues)
        assert [81 - row["prompt"].count(".") for row in rows] == [28, 28]
    rows, _ = load_reasoning_dataset("sudoku", "train[:3]", puzzle_size=9, num_clues=[24, 28], num_guesses=[2, 20])
    assert all(2 <= sudoku_guesses(prompt) <= 20 for prompt in rows["prompt"])
    assert len(load_reasoning_dataset("maze", "test[:1]")[0][0]["answer"]) == 81
    # Data that are not generated take no notice; a name that no dataset has is a mistake of the program.
    with pytest.raises(TypeError, match="puzle_size"):
        load_reasoning_dataset("sudoku", puzle_size=4)


def test_every_option_is_taken_by_some_dataset():
    assert {option for name in GENERATORS for option in options_taken(name)} == set(vars(GeneratorOptions()))
    assert GeneratorOptions(puzzle_size=4).generator_options() == {"puzzle_size": 4}


@pytest.mark.parametrize("command", ["evaluate", "datagen"])
def test_every_option_is_a_flag(command, capsys):
    assert main([command, "--help"]) == 0
    flags = set(capsys.readouterr().out.split())
    assert {f"--{name}" for name in vars(GeneratorOptions())} <= flags


def test_a_run_records_the_options_of_its_data():
    """Where they are left out too, or a stream would go on with others after a change of a default."""

    class Trainer:
        def train(self, resume_from_checkpoint):
            pass

        save_model = save_state = lambda self: None

    for arguments, recorded in (
        (
            {"dataset_name": "sudoku", "num_clues": [5, 6]},
            {"puzzle_size": 4, "num_clues": [5, 6], "num_guesses": None},
        ),
        ({"dataset_name": "arithmetic"}, {"num_terms": 8}),
        ({"dataset_name": "gsm8k", "num_terms": 3}, {}),
    ):
        trainer = Trainer()
        train_and_save(trainer, None, DataArguments(**arguments))
        found = {name: value for name, value in trainer.recipe_settings.items() if name in vars(GeneratorOptions())}
        assert found == recorded


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "name, split, options, named",
    [
        ("sudoku", "train", {"puzzle_size": 5}, "puzzle_size of a sudoku must be 4, 6 or 9, got 5"),
        ("sudoku", "train", {"num_clues": 17}, "num_clues must be a number from 4 to 15, .* got 17"),
        ("sudoku", "train", {"num_clues": [8, 5]}, "got 8 5"),
        ("sudoku", "train", {"num_clues": []}, "num_clues must be"),
        ("sudoku", "train", {"num_guesses": -1}, "num_guesses must be a number from 0, .* got -1"),
        ("sudoku", "test", {"num_clues": 15}, "about 460 different test sudokus .* 1,000 are too many"),
        ("sudoku", "train[3:3]", {}, r"sudoku \[train\[3:3\]\] is empty"),
        ("sudoku", "train[60000:]", {}, "is empty"),
        ("sudoku", "dev", {}, "sudoku has no split 'dev', it has train, test"),
        ("sudoku", "train[:10%]", {}, "sudoku is sliced by numbers"),
        ("sudoku", "train", {"num_terms": 3}, "sudoku takes no num_terms"),
        ("maze", "train", {"puzzle_size": 8}, "odd number from 5 to 99, got 8"),
        ("maze", "train", {"num_clues": [3]}, "maze takes no num_clues .* only puzzle_size"),
        ("arithmetic", "train", {"puzzle_size": 4}, "arithmetic takes no puzzle_size"),
        ("prefix_sum", "train", {"num_terms": 8}, "about 230 different train rows of 8 bits, not 50,000"),
        ("prefix_sum", "train", {"num_terms": 1}, "between 2 and 1000, got 1"),
    ],
)
def test_wrong_options_are_refused_at_once(name, split, options, named, streaming):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=named):
        load_reasoning_dataset(name, split, streaming=streaming, **options)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "function, options",
    [
        (mazes, {"puzzle_size": 5, "split": "test"}),
        (sudoku_puzzles, {"puzzle_size": 9, "num_clues": 17}),
        (sudoku_puzzles, {"puzzle_size": 4, "num_guesses": 1}),
        (prefix_sums, {"num_terms": 2, "split": "test"}),
    ],
)
def test_what_there_is_not_enough_of_ends(function, options):
    number = 10_000 if function is not prefix_sums else 1
    with pytest.raises(ValueError, match="ask for fewer"):
        list(function(number, **options))
