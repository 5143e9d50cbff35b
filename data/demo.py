"""Draws a few articles of a catalogue of the repo, which no run has seen, in the layout of the Kaggle dataset:

    python -m data.demo --out DIR --rows 8 --seed 1

That is the demo's catalogue, see `data.fashion`; `--catalogue furniture` draws the other one, see `data.furniture`.
"""

from pathlib import Path

from data import fashion, furniture
from durable import replace_csv
from errors import Parser, UserError, exits_cleanly, make_folder, positive_int


@exits_cleanly
def main():
    parser = Parser(description="Draw a few articles of one of the repo's catalogues: a table beside images/.")
    parser.add_argument("--catalogue", choices=("fashion", "furniture"), default="fashion", help="(default: fashion)")
    parser.add_argument("--out", type=Path, required=True, help="folder for a CSV file and images/")
    parser.add_argument("--rows", type=positive_int, default=8, help="how many articles to draw")
    parser.add_argument("--seed", type=int, default=1, help="which catalogue to draw from; training uses 0")
    args = parser.parse_args()
    if args.seed < 0:
        raise UserError(f"--seed {args.seed} is negative")
    table = args.out / ("items.csv" if args.catalogue == "furniture" else "styles.csv")
    if table.exists() or (args.out / "images").exists():
        raise UserError(f"--out {args.out} holds a catalogue already; name another folder")
    make_folder(args.out / "images", "--out")
    rows, draw = [], furniture.draw if args.catalogue == "furniture" else fashion.draw
    for index in range(args.rows):
        row, image = draw(index, args.seed)
        image.save(args.out / "images" / row.get("image", f"{row['id']}.jpg"), quality=92)
        rows.append(row)
    replace_csv(table, [rows[0], *(row.values() for row in rows)])
    print(f"drew {len(rows)} articles to {args.out / 'images'}, their labels to {table}")


if __name__ == "__main__":
    main()
