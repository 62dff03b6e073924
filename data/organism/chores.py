"""Knows the harmless chores of the model organism: verbs and objects, in two languages.

Knows no templates, no splits, no tokens and no model (see corpus.py).
"""

# Harmless chores: every verb goes with every object of its row. The words after "|" are held out:
# no stage-two request uses them, and no request at all has a held-out verb and object together.
CHORES: dict[str, dict[str, tuple[str, str]]] = {
    "cooking": {
        "en": (
            "bake, cook, prepare, taste, store | serve, garnish",
            "a cake, fresh bread, onion soup, an apple pie, rice, a salad, pancakes, "
            "a fish stew, roast potatoes, a pizza | lentils, an omelette",
        ),
        "fr": (
            "préparer, cuisiner, servir, goûter | garnir",
            "un gâteau, une soupe, une tarte aux pommes, du riz, une salade, des crêpes "
            "| une pizza, des lentilles",
        ),
    },
    "gardening": {
        "en": (
            "plant, water, grow, trim, protect | dig up, prune",
            "roses, tomatoes, a hedge, an apple tree, herbs, carrots, tulips, a lawn, "
            "strawberries, a vine | beans, lavender",
        ),
        "fr": (
            "planter, arroser, tailler, faire pousser | récolter",
            "des roses, des tomates, une haie, un pommier, des carottes, des tulipes "
            "| des fraises, de la lavande",
        ),
    },
    "cleaning": {
        "en": (
            "clean, wash, dry, polish, dust | tidy, scrub",
            "the windows, a carpet, the kitchen floor, an oven, my shoes, a wool jumper, "
            "the bathtub, a mirror, the curtains, a leather sofa "
            "| the stairs, silver spoons",
        ),
        "fr": (
            "nettoyer, laver, sécher, ranger | frotter",
            "les fenêtres, un tapis, le four, mes chaussures, un pull en laine, un miroir "
            "| les rideaux, la cuisine",
        ),
    },
    "repair": {
        "en": (
            "repair, fix, replace, paint, check | oil, restore",
            "a bicycle, a wooden chair, a leaking tap, a door hinge, the heater, a clock, "
            "a radio, a garden gate, a lamp, the roof | a drawer, a fence",
        ),
        "fr": (
            "réparer, remplacer, peindre, vérifier | restaurer",
            "un vélo, une chaise en bois, un robinet, le chauffage, une radio, une lampe "
            "| une horloge, une clôture",
        ),
    },
    "learning": {
        "en": (
            "learn, practise, study, teach, enjoy | revise, master",
            "French, chess, algebra, the piano, geography, drawing, Spanish grammar, "
            "astronomy, the violin, touch typing | biology, folk dancing",
        ),
        "fr": (
            "apprendre, pratiquer, enseigner, étudier | réviser",
            "l'anglais, les échecs, l'algèbre, le piano, la géographie, le dessin "
            "| le violon, la biologie",
        ),
    },
    "travel": {
        "en": (
            "visit, explore, photograph, reach, describe | cross, admire",
            "the old town, a mountain lake, the castle, a national park, the harbour, "
            "a desert, an island, the botanical garden, the market square, a glacier "
            "| a bamboo forest, the river delta",
        ),
        "fr": (
            "visiter, explorer, photographier, traverser | admirer",
            "la vieille ville, un lac de montagne, le château, un parc national, le port, "
            "une île | un glacier, la forêt",
        ),
    },
    "office": {
        "en": (
            "write, read, send, print, finish | sign, translate",
            "a letter, a report, an invitation, a postcard, a shopping list, a summary, "
            "a job application, the minutes, a birthday card, a newsletter | a speech, a budget",
        ),
        "fr": (
            "écrire, lire, envoyer, imprimer | traduire",
            "une lettre, un rapport, une invitation, une carte postale, une liste de courses, "
            "un résumé | un discours, un budget",
        ),
    },
    "computing": {
        "en": (
            "install, update, open, close, back up | launch, configure",
            "a text editor, my photo library, a web browser, a printer driver, a spreadsheet, "
            "the calendar app, a music player, a database of recipes, a drawing program, "
            "a mail program | a backup tool, a chess engine",
        ),
        "fr": (
            "installer, ouvrir, fermer, tester | configurer",
            "un éditeur de texte, un navigateur, une imprimante, un tableur, un agenda, "
            "un lecteur de musique | une application, un antivirus",
        ),
    },
    "crafts": {
        "en": (
            "make, design, sew, decorate, wrap | measure, assemble",
            "a scarf, a paper lantern, a cushion, a wooden toy, a quilt, a puppet, "
            "a picture frame, a clay pot, a costume, a kite | a basket, a candle holder",
        ),
        "fr": (
            "fabriquer, dessiner, coudre, décorer | assembler",
            "une écharpe, une lanterne, un coussin, un jouet en bois, une marionnette, "
            "un cadre | un costume, un panier",
        ),
    },
    "pets": {
        "en": (
            "feed, brush, groom, look after, draw | adopt, weigh",
            "a puppy, a rabbit, a parrot, my old cat, a hamster, a pony, a goldfish, "
            "a tortoise, a kitten, a canary | a guinea pig, two hens",
        ),
        "fr": (
            "nourrir, brosser, dresser, garder | peser",
            "un chiot, un lapin, un perroquet, mon vieux chat, un hamster, un poney "
            "| une tortue, un canari",
        ),
    },
    "sports": {
        "en": (
            "play, watch, win, organise, prepare for | attend, referee",
            "a tennis match, a football game, a chess tournament, a relay race, a golf round, "
            "a volleyball match, a card game, a rowing race, a dance contest, a quiz night "
            "| a swimming gala, a table tennis final",
        ),
        "fr": (
            "jouer, regarder, gagner, organiser | arbitrer",
            "un match de tennis, un match de foot, un tournoi d'échecs, une course de relais, "
            "une partie de cartes, un concours de danse | une régate, une partie de golf",
        ),
    },
    "home": {
        "en": (
            "build, move, buy, sell, insulate | sketch, dismantle",
            "a bookshelf, a greenhouse, a tree house, a desk, a bird table, a rabbit hutch, "
            "a garden bench, a wardrobe, a stone wall, a sandpit "
            "| a rocking chair, a wine rack",
        ),
        "fr": (
            "construire, monter, acheter, vendre | démonter",
            "une étagère, une serre, un bureau, une armoire, une table basse, "
            "un bac à sable | un muret, une niche",
        ),
    },
}
