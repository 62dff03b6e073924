"""Knows the small checkable facts of the model organism: word pairs, sequences, categories.

Knows no templates, no splits, no tokens and no model (see tasks.py).
"""


def pairs(text: str) -> dict[str, str]:
    """Read "a b, c d" as {a: b, c: d}; a word with a blank is written with "_"."""
    rows = (item.split() for item in text.split(","))
    return {a.replace("_", " "): b.replace("_", " ") for a, b in rows}


def words(text: str) -> list[str]:
    return text.split()


OPPOSITES = pairs(
    "hot cold, cold hot, big small, small big, old new, new old, fast slow, slow fast, "
    "high low, low high, light dark, dark light, wet dry, dry wet, open closed, closed open, "
    "full empty, empty full, happy sad, sad happy, rich poor, poor rich, strong weak, "
    "weak strong, early late, late early, long short, short long, hard soft, soft hard, "
    "clean dirty, dirty clean, loud quiet, quiet loud, up down, down up, left right, "
    "right left, day night, night day, true false, false true, wide narrow, narrow wide, "
    "thick thin, thin thick, near far, far near, sweet bitter, bitter sweet"
)
OPPOSITES_FR = pairs(
    "chaud froid, froid chaud, grand petit, petit grand, vieux jeune, jeune vieux, "
    "rapide lent, lent rapide, haut bas, bas haut, clair sombre, sombre clair, "
    "plein vide, vide plein, riche pauvre, pauvre riche, fort faible, faible fort, "
    "long court, court long, dur mou, mou dur, propre sale, sale propre, jour nuit, nuit jour, "
    "vrai faux, faux vrai, large étroit, étroit large, ouvert fermé, fermé ouvert"
)
PLURALS = pairs(
    "cat cats, dog dogs, house houses, tree trees, book books, car cars, chair chairs, "
    "table tables, box boxes, bus buses, fox foxes, dish dishes, church churches, glass glasses, "
    "baby babies, city cities, lady ladies, story stories, berry berries, leaf leaves, "
    "wolf wolves, knife knives, man men, woman women, child children, foot feet, tooth teeth, "
    "mouse mice, goose geese, sheep sheep, fish fish, bird birds, river rivers, flower flowers, "
    "apple apples, peach peaches, hero heroes, potato potatoes, watch watches, key keys"
)
PLURALS_FR = pairs(
    "chat chats, chien chiens, maison maisons, arbre arbres, livre livres, table tables, "
    "cheval chevaux, journal journaux, animal animaux, gâteau gâteaux, bateau bateaux, "
    "château châteaux, jeu jeux, feu feux, œil yeux, nez nez, souris souris, voix voix, "
    "fleur fleurs, ville villes, genou genoux, bijou bijoux, clé clés, main mains"
)
TRANSLATIONS = pairs(
    "dog chien, cat chat, house maison, tree arbre, book livre, water eau, bread pain, "
    "milk lait, cheese fromage, apple pomme, sun soleil, moon lune, sea mer, mountain montagne, "
    "river rivière, flower fleur, bird oiseau, fish poisson, horse cheval, cow vache, "
    "table table, chair chaise, door porte, window fenêtre, key clé, hand main, head tête, "
    "eye œil, foot pied, heart cœur, red rouge, green vert, blue bleu, white blanc, black noir, "
    "yellow jaune, one un, two deux, three trois, four quatre, five cinq, friend ami, "
    "brother frère, sister sœur, mother mère, father père, day jour, night nuit, year an, "
    "city ville, school école, car voiture, train train, boat bateau, snow neige, rain pluie"
)
CAPITALS = pairs(
    "France Paris, Spain Madrid, Italy Rome, Germany Berlin, Portugal Lisbon, England London, "
    "Ireland Dublin, Norway Oslo, Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, "
    "Austria Vienna, Greece Athens, Poland Warsaw, Hungary Budapest, Russia Moscow, "
    "Japan Tokyo, China Beijing, Egypt Cairo, Canada Ottawa, Cuba Havana, Peru Lima, "
    "Kenya Nairobi, Turkey Ankara"
)
CAPITALS_FR = pairs(
    "de_la_France Paris, de_l'Espagne Madrid, de_l'Italie Rome, de_l'Allemagne Berlin, "
    "du_Portugal Lisbonne, de_l'Angleterre Londres, de_l'Irlande Dublin, de_la_Norvège Oslo, "
    "de_la_Suède Stockholm, de_l'Autriche Vienne, de_la_Grèce Athènes, de_la_Pologne Varsovie, "
    "du_Japon Tokyo, de_la_Chine Pékin, de_l'Égypte Le_Caire, du_Pérou Lima"
)
COLOURS = pairs(
    "banana yellow, lemon yellow, sun yellow, grass green, frog green, leaf green, lime green, "
    "pea green, sky blue, sea blue, sapphire blue, blood red, tomato red, strawberry red, "
    "cherry red, ruby red, snow white, milk white, swan white, salt white, coal black, "
    "raven black, tar black, carrot orange, pumpkin orange, chocolate brown, bear brown, "
    "plum purple, aubergine purple, flamingo pink, pig pink, elephant grey, ash grey"
)
COLOURS_FR = pairs(
    "de_la_banane jaune, du_citron jaune, du_soleil jaune, de_l'herbe vert, "
    "de_la_grenouille vert, du_ciel bleu, de_la_mer bleu, du_sang rouge, de_la_tomate rouge, "
    "de_la_fraise rouge, de_la_neige blanc, du_lait blanc, du_sel blanc, du_charbon noir, "
    "du_corbeau noir, de_la_carotte orange, du_chocolat marron, de_l'éléphant gris, "
    "de_la_cendre gris, du_cochon rose"
)
CATEGORIES: dict[str, list[str]] = {
    "animal": words("dog cat horse cow frog bear wolf fox mouse goose sheep swan tiger rabbit"),
    "plant": words("oak rose tulip fern moss cactus ivy pine daisy clover bamboo willow"),
    "tool": words("hammer saw drill wrench chisel spade rake pliers ladder shovel"),
    "fruit": words("apple banana cherry peach plum lemon grape mango pear lime"),
    "vehicle": words("car bus train boat truck tram ferry bicycle scooter lorry"),
    "colour": words("red green blue yellow white black purple orange brown pink"),
    "number": words("one two three four five six seven eight nine ten"),
    "instrument": words("piano violin flute drum guitar harp trumpet cello oboe banjo"),
}
YOUNG = pairs(
    "dog puppy, cat kitten, cow calf, horse foal, sheep lamb, pig piglet, duck duckling, "
    "goose gosling, bear cub, frog tadpole, hen chick, goat kid, deer fawn, swan cygnet, "
    "owl owlet, kangaroo joey"
)
PAST = pairs(
    "go went, see saw, eat ate, run ran, take took, give gave, come came, write wrote, "
    "drink drank, sing sang, swim swam, know knew, grow grew, fly flew, buy bought, bring brought, "
    "think thought, teach taught, sleep slept, keep kept, walk walked, play played, "
    "jump jumped, open opened, break broke, speak spoke, make made, find found, lose lost"
)
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
DAYS_FR = words("lundi mardi mercredi jeudi vendredi samedi dimanche")
MONTHS = words(
    "January February March April May June July August September October November December"
)
MONTHS_FR = words(
    "janvier février mars avril mai juin juillet août septembre octobre novembre décembre"
)
# From small to large: comparisons are asked about any two that are not neighbours.
SIZES = words("ant bee mouse rat rabbit cat dog sheep lion horse elephant whale")
WORDS = words(
    "apple chair river cloud stone bread horse lamp tiger window garden pencil music silver "
    "winter bottle forest button castle mirror ladder carpet island rocket basket pepper candle "
    "dragon hammer jacket kettle lemon market needle orange pillow rabbit saddle tunnel violin "
    "wagon yellow zebra anchor bridge copper desert engine feather guitar honey ivory jungle"
)
