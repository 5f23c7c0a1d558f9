"""Names and values that fill the templates, on two sides that never share a name.

Every invented name is built from parts, so that a reader of the training side knows the parts of
a validation name but has not met the name. Which side a name is on depends on the name alone,
never on a seed: two corpora of different seeds can be trained on and validated with each other.
"""

from __future__ import annotations

import random
import zlib

SIDES = ("train", "validation")

WOMEN = [
    "Ada",
    "Agnes",
    "Alma",
    "Anna",
    "Bella",
    "Bertha",
    "Carla",
    "Cecily",
    "Clara",
    "Cora",
    "Daisy",
    "Dora",
    "Edith",
    "Ella",
    "Elsa",
    "Emma",
    "Flora",
    "Freda",
    "Greta",
    "Hanna",
    "Helen",
    "Hilda",
    "Ida",
    "Ines",
    "Iris",
    "Irma",
    "Jana",
    "Julia",
    "Karin",
    "Laura",
    "Lena",
    "Lily",
    "Lucy",
    "Magda",
    "Maria",
    "Marta",
    "Mina",
    "Nelly",
    "Nina",
    "Nora",
    "Olga",
    "Paula",
    "Petra",
    "Rita",
    "Rosa",
    "Ruth",
    "Sara",
    "Selma",
    "Sofia",
    "Stella",
    "Tessa",
    "Thea",
    "Ursula",
    "Vera",
    "Wanda",
    "Zelda",
]
MEN = [
    "Adam",
    "Albert",
    "Alfred",
    "Anton",
    "Arthur",
    "Basil",
    "Boris",
    "Bruno",
    "Carl",
    "Cyril",
    "Daniel",
    "David",
    "Edgar",
    "Emil",
    "Erik",
    "Felix",
    "Frank",
    "Fritz",
    "George",
    "Gustav",
    "Hans",
    "Harold",
    "Henry",
    "Hugo",
    "Igor",
    "Ivan",
    "Jakob",
    "John",
    "Jonas",
    "Karl",
    "Kurt",
    "Leo",
    "Leon",
    "Louis",
    "Lukas",
    "Marco",
    "Martin",
    "Max",
    "Mirko",
    "Nils",
    "Oscar",
    "Otto",
    "Pablo",
    "Paul",
    "Peter",
    "Ralph",
    "Robert",
    "Rolf",
    "Samuel",
    "Simon",
    "Stefan",
    "Theo",
    "Thomas",
    "Victor",
    "Walter",
    "William",
]
SURNAME_HEADS = [
    "Al",
    "Ar",
    "Bar",
    "Bel",
    "Bran",
    "Cald",
    "Car",
    "Dal",
    "Den",
    "Dor",
    "El",
    "Far",
    "Fen",
    "Gar",
    "Gil",
    "Hal",
    "Har",
    "Hol",
    "Kel",
    "Lang",
    "Lin",
    "Mar",
    "Mel",
    "Nor",
    "Or",
    "Pen",
    "Quin",
    "Ras",
    "Ros",
    "Sel",
    "Stan",
    "Tal",
    "Thor",
    "Tol",
    "Ul",
    "Ver",
    "Wal",
    "Wen",
    "Win",
    "Yar",
]
SURNAME_TAILS = [
    "ber",
    "by",
    "cott",
    "den",
    "ding",
    "er",
    "gate",
    "holm",
    "king",
    "low",
    "man",
    "mer",
    "ner",
    "sen",
    "son",
    "stock",
    "ter",
    "ton",
    "vik",
    "well",
    "wick",
    "win",
    "worth",
]
TOWN_HEADS = [
    "Ash",
    "Black",
    "Bram",
    "Brid",
    "Cam",
    "Clay",
    "Cold",
    "Crow",
    "Dun",
    "East",
    "Elm",
    "Fair",
    "Fox",
    "Glen",
    "Gold",
    "Grim",
    "Hazel",
    "High",
    "Horn",
    "Iron",
    "King",
    "Lark",
    "Long",
    "Mill",
    "Moss",
    "North",
    "Oak",
    "Old",
    "Pine",
    "Raven",
    "Red",
    "Rock",
    "Sand",
    "Silver",
    "South",
    "Stone",
    "Thorn",
    "West",
    "White",
    "Wolf",
]
TOWN_TAILS = [
    "beck",
    "bourne",
    "bridge",
    "bury",
    "castle",
    "church",
    "dale",
    "field",
    "ford",
    "gate",
    "ham",
    "haven",
    "hill",
    "hurst",
    "land",
    "leigh",
    "mere",
    "minster",
    "moor",
    "mouth",
    "port",
    "ridge",
    "shaw",
    "stead",
    "thorpe",
    "ton",
    "vale",
    "ville",
    "wood",
]
RIVER_HEADS = [
    "Ar",
    "Bel",
    "Cor",
    "Dan",
    "El",
    "Gar",
    "Il",
    "Kal",
    "Lo",
    "Mor",
    "Ner",
    "Or",
    "Pel",
    "Ser",
    "Tam",
    "Ur",
    "Ver",
    "Zel",
]
RIVER_TAILS = ["an", "en", "is", "on", "us", "va", "wen"]
QUALITIES = [
    "Amber",
    "Bold",
    "Brave",
    "Bright",
    "Broken",
    "Calm",
    "Clever",
    "Crimson",
    "Distant",
    "Early",
    "Endless",
    "Faithful",
    "Gentle",
    "Golden",
    "Happy",
    "Hidden",
    "Humble",
    "Lonely",
    "Loyal",
    "Lucky",
    "Merry",
    "Noble",
    "Patient",
    "Proud",
    "Quiet",
    "Restless",
    "Royal",
    "Secret",
    "Silent",
    "Silver",
    "Sleeping",
    "Swift",
    "Velvet",
    "Wandering",
    "Wild",
]
THINGS = [
    "Anchor",
    "Angel",
    "Arrow",
    "Clock",
    "Compass",
    "Crown",
    "Dolphin",
    "Eagle",
    "Falcon",
    "Garden",
    "Harvest",
    "Heron",
    "Horizon",
    "Island",
    "Journey",
    "Lantern",
    "Letter",
    "Lion",
    "Maiden",
    "Meadow",
    "Mirror",
    "Morning",
    "Orchard",
    "Pilgrim",
    "Rose",
    "Sailor",
    "Shadow",
    "Shepherd",
    "Star",
    "Stranger",
    "Summer",
    "Swan",
    "Tiger",
    "Traveller",
    "Voyage",
    "Window",
    "Winter",
]
MOUNTAIN_HEADS = [
    "Ab",
    "Bor",
    "Cam",
    "Dra",
    "Eb",
    "Fal",
    "Gor",
    "Hel",
    "Is",
    "Kar",
    "Lom",
    "Mon",
    "Nev",
    "Or",
    "Pir",
    "Rag",
    "Sil",
    "Tor",
    "Vol",
    "Zan",
]
MOUNTAIN_TAILS = [
    "ador",
    "agon",
    "amor",
    "aris",
    "atha",
    "elin",
    "emor",
    "endo",
    "idor",
    "imar",
    "isco",
    "ola",
    "oran",
    "orin",
    "una",
]
MINERAL_HEADS = [
    "Ald",
    "Bor",
    "Cal",
    "Cor",
    "Dol",
    "Fer",
    "Gal",
    "Hel",
    "Jar",
    "Kor",
    "Lan",
    "Mag",
    "Nic",
    "Pal",
    "Rub",
    "Sel",
    "Tan",
    "Ven",
    "Xan",
    "Zir",
]
MINERAL_TAILS = [
    "anite",
    "asite",
    "atite",
    "elite",
    "erite",
    "etite",
    "idite",
    "inite",
    "olite",
    "orite",
    "osite",
    "ulite",
]
BIRD_KINDS = [
    "bunting",
    "crane",
    "duck",
    "finch",
    "grouse",
    "gull",
    "lark",
    "owl",
    "plover",
    "quail",
    "starling",
    "tern",
    "thrush",
    "warbler",
    "wren",
]
FESTIVALS = [
    "Apple",
    "Balloon",
    "Candle",
    "Cherry",
    "Drum",
    "Flower",
    "Fire",
    "Harvest",
    "Honey",
    "Kite",
    "Lantern",
    "Mask",
    "River",
    "Spring",
]
MUSEUMS = [
    "Clock",
    "Doll",
    "Glass",
    "Lace",
    "Map",
    "Paper",
    "Salt",
    "Ship",
    "Silk",
    "Tea",
    "Toy",
    "Wool",
]
PAPERS = [
    "Chronicle",
    "Courier",
    "Echo",
    "Gazette",
    "Herald",
    "Journal",
    "Mail",
    "Mirror",
    "News",
    "Observer",
    "Post",
    "Tribune",
]
TRADES = ["Brothers", "Sons", "Partners", "Traders", "Works", "Mills", "Stores", "Company"]

LISTS = {
    "animal": """badger bear beaver boar deer fox goat hare hedgehog lynx marten mole polecat
rabbit raccoon reindeer seal squirrel stag toad tortoise weasel wolf wolverine""",
    "cargo": """amber barley candles cloth coal coffee copper cotton figs furs glass grain herring
leather oranges paper pepper raisins rope rum salt silk soap spices sugar tar tea timber tobacco
whale_oil wine wool""",
    "colour": "beige black blue brown crimson golden green grey orange pink purple red silver "
    "turquoise violet white yellow",
    "crop": """apples barley beans beetroot cabbage carrots cherries clover flax garlic grapes hops
lavender lentils maize millet mustard oats olives onions peas plums potatoes pumpkins rye saffron
spinach strawberries sunflowers turnips wheat""",
    "field": """algebra anatomy astronomy botany chemistry economics ethics genetics geography geology
geometry grammar history law logic mechanics medicine optics philosophy physics statistics theology
zoology""",
    "food": """apple_pie baked_beans bean_soup black_pudding cheese_cake cold_ham fish_stew fried_eels
garlic_bread goose_liver grilled_herring honey_cake lamb_stew lentil_soup mushroom_pie onion_soup
pea_soup plum_dumplings potato_salad roast_duck roast_pork salted_cod smoked_trout sour_cherries""",
    "instrument": """accordion banjo bassoon cello clarinet drum fiddle flute guitar harp horn lute
mandolin oboe organ piano trombone trumpet tuba viola violin zither""",
    "language": """Arabic Basque Breton Catalan Czech Danish Dutch Estonian Finnish French Greek Hebrew
Hungarian Irish Italian Latin Latvian Norwegian Persian Polish Romanian Russian Spanish Swedish
Turkish Welsh""",
    "material": """brick bronze cast_iron cedar clay concrete flint granite limestone marble oak
pine red_sandstone steel teak white_limestone wrought_iron""",
    "mineral": """basalt chalk copper_ore dolomite gneiss gold grey_slate gypsum jasper lead marble
pink_granite porphyry pumice quartz rock_salt silver_ore sulphur tin zinc""",
    "month": """January February March April May June July August September October November
December""",
    "motif": """bare_trees bathing_women boats burning_houses cathedrals children dancing_bears
empty_streets farmers fishing_boats frozen_lakes fruit_bowls horses hunters ladies old_bridges
railway_stations ruins snow_scenes soldiers stormy_seas sunsets waterfalls windmills""",
    "object": """bottles bronze_bells buttons clay_pipes coins dolls fans fossils gold_cups
horse_saddles iron_keys lamps masks medals music_boxes old_maps pistols pocket_watches puppets
seals silver_spoons stamps swords tapestries thimbles umbrellas wax_figures wooden_shoes""",
    "prey": """acorns ants beetles berries caterpillars crabs crickets earthworms fish flies frogs
grasshoppers lizards mice mosquitoes moss mussels nuts pine_seeds seaweed shrimps slugs snails
spiders termites wasps""",
    "product": """ball_bearings bicycles boots brushes buttons carpets cement chairs clocks fertiliser
fishing_nets furniture glue gloves hats ink knives lamps locks matches mirrors nails needles paint
pencils pipes porcelain pumps razors shoe_polish soap stoves tiles toys umbrellas varnish""",
    "weekday": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
}
VALUES = {
    kind: tuple(word.replace("_", " ") for word in text.split()) for kind, text in LISTS.items()
}
NUMBER_WORDS = [
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]
YEARS = range(1780, 2016)


def side_of(name: str) -> str:
    """The side of an invented name: one name in four belongs to the validation."""
    return "validation" if zlib.crc32(name.encode()) % 4 == 0 else "train"


class Names:
    """Draws names of one side and plain values (years, colours, lengths) of no side."""

    def __init__(self, side: str, rng: random.Random):
        self.side = side
        self.rng = rng
        self.drawn: set[str] = set()  # every name given out, for whoever checks the two sides

    def subject(self, kind: str) -> tuple[str, str]:
        """A new subject of a passage: its name as in the middle of a sentence, and its pronoun."""
        if kind == "person":
            return self._person()
        return self.invented(kind), "it"

    def value(self, kind: str) -> str:
        """An answer, or a filler, of `kind`; years are drawn elsewhere, in their order."""
        pick = self.rng.choice
        if kind in VALUES:
            return pick(VALUES[kind])
        if kind == "person":
            return self._person()[0]
        if kind == "count":
            return str(self.rng.randrange(20, 990))
        if kind == "metres":
            return f"{self.rng.randrange(40, 990)} metres"
        if kind == "kilometres":
            return f"{self.rng.randrange(40, 990)} kilometres"
        if kind == "grams":
            return f"{self.rng.randrange(20, 990)} grams"
        if kind == "knots":
            return f"{pick(NUMBER_WORDS)} knots"
        if kind == "price":
            return f"{pick(NUMBER_WORDS)} {pick(('crowns', 'dollars', 'florins', 'pounds'))}"
        if kind == "duration":
            return f"{pick(NUMBER_WORDS)} {pick(('days', 'hours', 'nights', 'weeks'))}"
        return self.invented(kind)

    def invented(self, kind: str) -> str:
        """A name of this side. Raises KeyError for an unknown kind."""
        make = {
            "bird": lambda: f"the {self._town()} {self.rng.choice(BIRD_KINDS)}",
            "bridge": lambda: f"{self._town()} Bridge",
            "castle": lambda: f"{self._town()} Castle",
            "company": lambda: f"{self._surname()} {self.rng.choice(TRADES)}",
            "expedition": lambda: f"the {self._surname()} Expedition",
            "festival": lambda: f"the {self._town()} {self.rng.choice(FESTIVALS)} Festival",
            "mineral": lambda: self._draw(MINERAL_HEADS, MINERAL_TAILS).lower(),
            "mountain": lambda: "Mount " + self._draw(MOUNTAIN_HEADS, MOUNTAIN_TAILS),
            "museum": lambda: f"the {self._town()} {self.rng.choice(MUSEUMS)} Museum",
            "newspaper": lambda: f"the {self._town()} {self.rng.choice(PAPERS)}",
            "novel": lambda: "The " + self._draw(QUALITIES, THINGS, " "),
            "river": lambda: self._draw(RIVER_HEADS, RIVER_TAILS),
            "school": lambda: f"{self._surname()} College",
            "ship": lambda: "the " + self._draw(QUALITIES, THINGS, " "),
            "town": self._town,
        }
        return make[kind]()

    def _town(self) -> str:
        return self._draw(TOWN_HEADS, TOWN_TAILS)

    def _surname(self) -> str:
        return self._draw(SURNAME_HEADS, SURNAME_TAILS)

    def _person(self) -> tuple[str, str]:
        first, pronoun = self.rng.choice(((WOMEN, "she"), (MEN, "he")))
        return f"{self.rng.choice(first)} {self._surname()}", pronoun

    def _draw(self, heads: list[str], tails: list[str], between: str = "") -> str:
        while True:
            name = self.rng.choice(heads) + between + self.rng.choice(tails)
            if side_of(name.lower()) == self.side:
                self.drawn.add(name.lower())
                return name
