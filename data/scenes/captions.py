"""Small grammars that describe a scene in English, French and Spanish, with synonyms."""

from data.scenes.scene import LANGUAGES

ENGLISH = {
    "count": {1: ["a", "one", "a single"], 2: ["two", "a pair of"], 3: ["three", "a trio of"]},
    "size": {"small": ["small", "little", "tiny"], "large": ["large", "big", "huge"]},
    "colour": {
        "red": ["red", "scarlet"],
        "orange": ["orange"],
        "yellow": ["yellow"],
        "green": ["green"],
        "blue": ["blue"],
        "purple": ["purple", "violet"],
        "pink": ["pink", "rose"],
        "brown": ["brown", "chestnut"],
    },
    "shape": {
        "circle": ["circle", "disc"],
        "square": ["square"],
        "triangle": ["triangle"],
        "star": ["star"],
        "heart": ["heart"],
        "cross": ["cross", "plus sign"],
        "ring": ["ring", "hoop"],
        "diamond": ["diamond", "rhombus"],
    },
    "place": {
        "top": ["at the top", "in the upper part"],
        "bottom": ["at the bottom", "in the lower part"],
        "left": ["on the left", "at the left edge"],
        "right": ["on the right", "at the right edge"],
        "middle": ["in the middle", "in the centre"],
    },
    "background": {"white": ["white"], "grey": ["grey"], "black": ["black"], "sky": ["pale blue"]},
    "sentence": ["{kinds}, on a {background} background", "on a {background} background, {kinds}"],
    "and": "and",
}

# A noun is (singular, plural, feminine?); an adjective (masculine, feminine), each plus its plural.
FRENCH = {
    "count": {1: [("un", "une")], 2: [("deux", "deux")], 3: [("trois", "trois")]},
    "size": {
        "small": [("petit", "petite", "petits", "petites")],
        "large": [("grand", "grande", "grands", "grandes"), ("gros", "grosse", "gros", "grosses")],
    },
    "colour": {
        "red": [("rouge", "rouge", "rouges", "rouges")],
        "orange": [("orange",) * 4],
        "yellow": [("jaune", "jaune", "jaunes", "jaunes")],
        "green": [("vert", "verte", "verts", "vertes")],
        "blue": [("bleu", "bleue", "bleus", "bleues")],
        "purple": [("violet", "violette", "violets", "violettes"), ("mauve", "mauve", "mauves", "mauves")],
        "pink": [("rose", "rose", "roses", "roses")],
        "brown": [("marron",) * 4, ("brun", "brune", "bruns", "brunes")],
    },
    "shape": {
        "circle": [("cercle", "cercles", False), ("disque", "disques", False)],
        "square": [("carré", "carrés", False)],
        "triangle": [("triangle", "triangles", False)],
        "star": [("étoile", "étoiles", True)],
        "heart": [("cœur", "cœurs", False)],
        "cross": [("croix", "croix", True)],
        "ring": [("anneau", "anneaux", False)],
        "diamond": [("losange", "losanges", False)],
    },
    "place": {
        "top": ["en haut"],
        "bottom": ["en bas"],
        "left": ["à gauche"],
        "right": ["à droite"],
        "middle": ["au milieu", "au centre"],
    },
    "background": {"white": ["blanc"], "grey": ["gris"], "black": ["noir"], "sky": ["bleu clair"]},
    "sentence": ["{kinds}, sur fond {background}", "sur fond {background}, {kinds}"],
    "and": "et",
}

SPANISH = {
    "count": {1: [("un", "una")], 2: [("dos", "dos")], 3: [("tres", "tres")]},
    "size": {
        "small": [("pequeño", "pequeña", "pequeños", "pequeñas")],
        "large": [("grande", "grande", "grandes", "grandes"), ("enorme", "enorme", "enormes", "enormes")],
    },
    "colour": {
        "red": [("rojo", "roja", "rojos", "rojas")],
        "orange": [("naranja", "naranja", "naranjas", "naranjas")],
        "yellow": [("amarillo", "amarilla", "amarillos", "amarillas")],
        "green": [("verde", "verde", "verdes", "verdes")],
        "blue": [("azul", "azul", "azules", "azules")],
        "purple": [("morado", "morada", "morados", "moradas")],
        "pink": [("rosa", "rosa", "rosas", "rosas"), ("rosado", "rosada", "rosados", "rosadas")],
        "brown": [("marrón", "marrón", "marrones", "marrones")],
    },
    "shape": {
        "circle": [("círculo", "círculos", False), ("disco", "discos", False)],
        "square": [("cuadrado", "cuadrados", False)],
        "triangle": [("triángulo", "triángulos", False)],
        "star": [("estrella", "estrellas", True)],
        "heart": [("corazón", "corazones", False)],
        "cross": [("cruz", "cruces", True)],
        "ring": [("anillo", "anillos", False), ("aro", "aros", False)],
        "diamond": [("rombo", "rombos", False)],
    },
    "place": {
        "top": ["arriba", "en la parte de arriba"],
        "bottom": ["abajo", "en la parte de abajo"],
        "left": ["a la izquierda"],
        "right": ["a la derecha"],
        "middle": ["en el centro", "en medio"],
    },
    "background": {"white": ["blanco"], "grey": ["gris"], "black": ["negro"], "sky": ["celeste"]},
    "sentence": ["{kinds}, sobre fondo {background}", "sobre fondo {background}, {kinds}"],
    "and": "y",
}


def canonical(scene):
    """The one English caption that names a scene: the first word of each meaning."""
    return sentence(scene, ENGLISH, english, lambda words: words[0])


def describe(scene, rng):
    """{language: caption} with words drawn at random."""
    grammars = {"en": (ENGLISH, english), "fr": (FRENCH, french), "es": (SPANISH, spanish)}

    def choose(words):
        return words[rng.integers(len(words))]

    return {language: sentence(scene, *grammars[language], choose) for language in LANGUAGES}


def sentence(scene, grammar, phrase, choose):
    """A caption: a phrase per kind, and the background; `choose` picks among synonyms."""
    phrases = [phrase(kind, lambda part, kind=kind: choose(grammar[part][getattr(kind, part)]))
               for kind in scene.kinds]  # fmt: skip
    kinds = f" {grammar['and']} ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))
    background = choose(grammar["background"][scene.background])
    return choose(grammar["sentence"]).format(kinds=kinds, background=background)


def english(kind, word):
    """two small red circles at the top"""
    noun = word("shape")
    if kind.count > 1:
        noun += "es" if noun.endswith(("s", "x")) else "s"
    return f"{word('count')} {word('size')} {word('colour')} {noun} {word('place')}"


def french(kind, word):
    """deux petits cercles rouges en haut"""
    *forms, feminine = word("shape")
    noun = forms[kind.count > 1]
    return " ".join([
        word("count")[feminine],
        agree(word("size"), kind, feminine),
        noun,
        agree(word("colour"), kind, feminine),
        word("place"),
    ])  # fmt: skip


def spanish(kind, word):
    """dos círculos rojos pequeños arriba"""
    *forms, feminine = word("shape")
    noun = forms[kind.count > 1]
    return " ".join([
        word("count")[feminine],
        noun,
        agree(word("colour"), kind, feminine),
        agree(word("size"), kind, feminine),
        word("place"),
    ])  # fmt: skip


def agree(forms, kind, feminine):
    """The form of an adjective: (masculine, feminine, masculine plural, feminine plural)."""
    return forms[2 * (kind.count > 1) + feminine]
