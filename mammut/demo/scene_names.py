"""Which emoji the demo's scenes and clips are made of."""

from __future__ import annotations

import hashlib

_NAMES = """
dog, cat, cow, pig, horse, rabbit, mouse, tiger, elephant, koala, bear, panda, fox, lion, monkey, frog, snake,
turtle, whale, octopus, fish, dolphin, shark, snail, ant, honeybee, butterfly, spider, crab, lobster, bird,
penguin, duck, owl, eagle, chicken, rooster, parrot, flamingo, giraffe, zebra, camel, bat, crocodile, unicorn,
gorilla, lizard, squid, tomato, lemon, banana, pineapple, red apple, green apple, pear, peach, strawberry,
coconut, mango, watermelon, melon, carrot, eggplant, avocado, cucumber, potato, broccoli, mushroom, onion,
pizza, hamburger, taco, egg, pretzel, bagel, waffle, doughnut, cookie, pie, cupcake, lollipop, tulip, rose,
sunflower, hibiscus, cactus, palm tree, evergreen tree, seedling, maple leaf, bus, taxi, automobile, train,
tractor, bicycle, motorcycle, ambulance, fire engine, police car, rocket, helicopter, airplane, sailboat, ship,
canoe, anchor, key, bell, guitar, trumpet, violin, drum, camera, television, light bulb, candle, green book,
blue book, orange book, scissors, pencil, paintbrush, hammer, wrench, axe, bomb, magnet, gear, umbrella, crown,
top hat, glasses, necktie, t-shirt, jeans, dress, backpack, ring, gem stone, trophy, microphone, radio, laptop,
battery, telephone, envelope, package, chair, bed, door, broom, basket, bathtub, soccer ball, baseball,
basketball, volleyball, kite, balloon, teddy bear, crystal ball, alarm clock, house, castle, factory, church,
tent, volcano, mountain, sun, cloud, star, snowman, rainbow, fire, droplet, crescent moon, snowflake, red
circle, blue circle, orange circle, yellow circle, green circle, purple circle, brown circle, red square, blue
square, orange square, yellow square, green square, purple square, brown square, red heart, blue heart, green
heart, yellow heart, purple heart, brown heart, orange heart, black heart, white heart
"""
SCENE_NAMES = frozenset(" ".join(name.split()) for name in _NAMES.split(","))
"""Things with short names that look like something at 30 pixels."""

SCENE_NOVEL = frozenset(name for name in SCENE_NAMES if hashlib.sha256(f"novel {name}".encode()).digest()[0] % 6 == 0)
"""Names whose boxes no detector is trained on; pictures of them are."""
