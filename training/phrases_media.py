"""Wordings of requests for clips and sounds, and of what is said about media, that the embedded default learns from.

The rest is in `phrases`, and what is said there of the phrasings of `anygen eval` holds here as well. Slots: {x} what
is asked for, {X} the same with a capital, {n} a number, {s} a style, {b} a background, {m} a motion.
"""

NAME_IT = (
    "What is this?", "what is it", "What do you see?", "What is shown here?", "Name this.", "Identify the object.",
    "What's in the picture?", "Can you tell me what this is?", "What does the image show?", "Which thing is this?",
    "Do you recognise this?", "What am I looking at?", "Tell me what is in this image.", "What is that called?",
    "and this?", "Look at this. What is it?", "Who or what is this?", "Please name the thing in this picture.",
    "what's this", "", "Any idea what this is?", "Can you name this?", "Can you identify what is shown?",
    "I found this on my phone, what is it?", "My son drew this. What do you think it is?", "Guess what this is.",
    "What kind of thing is that?", "What would you call this?", "What do we have here?",
    "What object is in the picture?", "What is the subject of this image?", "What has been drawn here?",
    "what am i seeing here", "Please tell me what you can see.", "I can't make out what this is, can you?",
    "Is this an animal, a plant or a thing, and which one?", "What does this represent?",
    "What does this icon stand for?", "What is that thing in the middle?", "Say what this is in one short sentence.",
    "In one word, what is it?", "Look closely: what is it?", "Have a look at this picture and say what it shows.",
    "I am blind. What is in this picture?", "What is on this photo?", "whats in the pic", "wat is this",
    "Which object did the artist draw?", "What can be seen in this drawing?", "Help me label this image. What is it?",
    "How would you label this?", "Could you tell me the name of what is shown here?", "Recognise it?",
    "Do you know what this picture shows?",
)  # fmt: skip
DESCRIBE = (
    "Describe this picture.", "Describe the image.", "Write a caption.", "Give me a caption for this.",
    "What does this picture look like?", "Tell me everything about this image.", "Explain what you see in detail.",
    "Caption this image, please.", "How would you describe this?", "Describe it with style and background.",
    "Describe what is shown here.", "Describe this drawing to someone who can't see it.",
    "Put this picture into words.", "What can you tell me about this picture?",
    "Give a full description of the image.", "I'd like a description of this picture, please.",
    "Write one sentence that describes this image.", "Which caption would fit this picture?",
    "Make an alt text for this image.", "Say what is shown, in which style, and on which background.",
    "Give me all the details of this picture.", "Tell me what you see and how it is drawn.", "describe pls",
    "caption?", "Sum up this image in a sentence.", "How would you explain this picture over the phone?",
)  # fmt: skip
ASK_STYLE = (
    "Which style is this drawn in?", "What is the style of this picture?", "In what style is it drawn?", "style?",
    "What kind of drawing style is this?", "Can you tell which style was used here?",
    "How is it drawn, in which style?", "Name the style of this image.", "what style is that",
    "Which art style do you see in this picture?", "Tell me the style, please.",
)  # fmt: skip
ASK_GROUND = (
    "What is the background?", "What colour is the background?", "Where is it?", "What is behind it?",
    "Which background does the picture have?", "What color is behind the object?", "What is in the background?",
    "Tell me what the background looks like.", "What do you see behind it?", "On what background is it shown?",
    "Name the background.", "What surrounds the object?", "which background is it",
    "Is there anything in the background, and what?", "What is it standing in front of?",
)  # fmt: skip
ASK_COUNT = (
    "How many are there?", "How many things are in the picture?", "Count them.", "how many?", "How many do you see?",
    "Is there one, or are there more?", "Count the things in this image.", "What number of them can you see?",
    "Tell me how many there are.", "How many of them are shown?", "Can you count what is in the picture?",
    "how many of these do u see", "Give me the number of objects.", "Is it a single one or several?",
)  # fmt: skip
AGAIN = (
    "Draw this again", "Draw the same thing", "Make me another one of these", "Redraw this", "Draw it once more",
    "Show me one like this", "Now you draw it", "Can you draw this", "Make a picture like this", "Draw what you see",
    "Another picture of this kind please", "Draw me another one of these", "Make one more of these",
    "Can you reproduce this image", "Please recreate what is shown", "I want the same picture again",
    "Draw this for me as well", "Do this one over", "Give me your own version of this",
    "Could you paint the same thing", "Try to draw this yourself", "I'd like a new picture of the same thing",
    "Sketch what is shown here",
)  # fmt: skip
AGAIN_JOINTS = ("{}, {}", "{}, {}", "{}. {}")
"""A request to make it again, and a change."""
CHANGE_THING = (
    "now make it {x}", "Now draw {x} instead.", "Change it to {x}.", "And now {x}?", "Make it {x}", "now {x}",
    "Replace it with {x}.", "I would rather have {x}.", "Can it be {x} instead?", "the same but with {x}",
    "Swap it for {x}.", "Actually, {x} would be better.", "No, I meant {x}.", "Forget that, make it {x}.",
    "Can you turn it into {x}?", "Keep everything else, but show {x}.", "Let's have {x} in its place.",
    "not that, {x} please", "Hmm, I'd prefer {x}.", "Do the same with {x}.", "And what would it look like with {x}?",
    "Next one: {x}.", "Please exchange it for {x}.", "One more like that, this time with {x}.",
)  # fmt: skip
CHANGE_STYLE = (
    "now in the {s} style", "Make it {s}.", "Can I have it in {s} style?", "Use the {s} style instead.", "and in {s}?",
    "Could you redo it in the {s} style?", "Try it in {s} style.", "I'd prefer the {s} style.", "Same thing, but {s}.",
    "How would it look in the {s} style?", "Switch the style to {s}.", "{s} style please", "The style should be {s}.",
    "Redraw it so that the style is {s}.", "I want to see it in {s} style now.",
    "Please change nothing but the style: {s}.",
)  # fmt: skip
CHANGE_GROUND = (
    "now put it {b}", "Place it {b}.", "Same thing {b}, please.", "Can it be {b}?", "and {b}?",
    "Change the background: {b}", "I'd like to see it {b}.", "Could you move it so that it is {b}?",
    "The same, but {b}.", "Keep it, but put it {b}.", "this time {b}", "What would it look like {b}?",
    "I want it {b}, please.", "Let it be {b}.", "Show it {b} instead.",
)  # fmt: skip
CHANGE_COUNT = (
    "now {n} of them", "Draw {n}.", "Make it {n}.", "I want {n} of these.", "and with {n}?", "Could you make it {n}?",
    "I need {n} of them.", "Show {n} of them instead.", "One more time, but with {n}.", "{n} please",
    "There should be {n}.", "Let there be {n} of them.", "Can I have {n}?", "Change the number to {n}.",
)  # fmt: skip

ASK_CLIP = (
    "make a video of", "make a clip of", "show me a clip of", "show me a video of", "film", "animate",
    "I want a video of", "create an animation of", "create a short film of", "generate a video of",
    "give me a clip of", "please animate", "let me watch", "let me see a film of", "can you film", "could you animate",
    "can you make a video with", "produce a short clip of", "render a video of", "I would like to watch",
    "I need a clip with", "now film", "shoot a video of", "please make a short video of", "record", "play a video of",
    "show a moving picture of", "let me see a video of", "I wanna watch a clip of", "could you please film",
    "would you make a short animation with", "get me a video of", "make a little movie with", "put together a clip of",
    "do an animation of", "would you mind filming", "I was hoping for a clip with", "can you put on a short film of",
    "I'd love a moving image of", "turn this into a video:", "come up with an animation that shows",
    "shoot a short film with", "can I see a video with", "send me a clip that shows", "we need a video of",
    "let us watch a clip of", "without any comment, make a clip of", "prepare a short video with",
    "kindly create a video of", "show me on video", "it's time for a movie with", "I'd like an animated version of",
    "draw an animation of", "quickly animate",
)  # fmt: skip
WHOLE_CLIP = (
    "video: {x}", "clip of {x}", "animation: {x}", "{x}, as a video", "{x}, animated please", "a short film of {x}",
    "Can you show me in a video how it goes: {x}?", "I want to watch {x}.", "For my channel I need a clip of {x}.",
    "Hello! Please make a video of {x}.", "generate video {x}", "pls animate {x}", "a gif of {x}", "make a gif: {x}",
    "I have never seen {x} on film. Show me.", "Surprise me with a clip of {x}!", "How about a little movie of {x}?",
    "Bring this to life: {x}", "It should move: {x}", "moving pictures of {x}, please", "{X}. As a video, please.",
    "{X}, but moving, not a still picture.", "{X}: make that a clip, no explanation.", "{x} video pls",
    "can u make a lil video w/ {x}", "gif pls: {x}", "animte {x} for me", "hey, got a clip of {x}?",
    "need a short vid, {x}, thx", "A still picture is not enough, I want a film of {x}.",
    "I don't want a photo, I want a video: {x}.",
    "Photos are boring; I would rather have a few seconds of film with {x}.",
    "Not a drawing this time! A clip of {x}, please.", "No words, just the clip: {x}.",
    "Answer with a video only. {X}.", "Roll the camera: {x}!", "Lights, camera, action: {x}!",
    "Camera on, and film {x} for a few seconds.",
    "I have a drawing of a house and a tree, but what I need now is a video of {x}.",
    "My trumpet lesson was long and dull; cheer me up with a film of {x}.",
    "We sat in the garden with the cat, and my nephew wanted to watch a clip of {x}. Could you make it?",
    "I am a teacher and would like to start my lesson with a short video that shows {x}.",
    "As a web designer I need an animated banner. It should show {x}.",
    "I run a channel for children. The next video shows {x}; please make it.",
    "You are a film maker. Your next short film shows {x}.",
    "You are an animator at a big studio, and the director wants {x} in the first scene. Animate it.",
    "Act as a camera operator and film {x}.", "Task: produce a video. Content: {x}.",
    "Input: {x}. Output: a short animation.", "Read the following description and make a clip from it: {x}",
    "Make a few frames that move, with {x} in them.", "Set this in motion: {x}.",
    "I would like to see how {x} would look in a film. Show me a clip.",
    "I wonder what {x} would be like in motion. Film it for me.", "Could there be a video of {x} for the start page?",
    "Is there any way to get {x} as an animation?", "Do you happen to have a short movie of {x}?",
    "Would you be able to animate {x}? I'd be very grateful.", "May I watch a clip? I'd like one with {x}.",
    "What would a movie of {x} look like? Make it.", "I wish I could watch {x} in a little film.",
    "Nothing would please me more than an animated clip of {x}.",
    "My grandson loves cartoons, let him watch a clip of {x}.",
    "For the opening of our show we need a moving image of {x} on the big screen.",
    "After the picture of the mountain I now want something that moves: {x}.",
    "Tonight is movie night. On the programme: {x}.",
    "Good morning! Would you please send me a short video clip with {x}?",
    "Sorry for asking again, but I still need that video of {x}.",
    "Dear assistant, kindly create an animation that shows {x}. Many thanks.", "On film, please: {x}",
    "The video should show {x}.", "A clip, three seconds or so, of {x}.", "Movie scene: {x}",
)  # fmt: skip
NAME_CLIP = (
    "What is this?", "What do you see?", "What is in the video?", "What does the clip show?",
    "Name the thing in this film.", "Who or what moves here?", "What am I watching?", "Tell me what is in this video.",
    "what's in the clip", "", "Any idea what this clip shows?", "What is moving here?",
    "Can you name what moves in this video?", "What thing appears in the film?", "Guess what is in this clip.",
    "Watch this. What is it?", "what's this video of", "whats in the vid", "What do you see in this clip?",
    "Which object is being filmed?", "Who is the star of this little film?", "What was filmed here?",
    "What is the subject of this video?", "What is the animation of?", "Identify the thing in the animation.",
    "In one word, what does the video show?", "I can't see the screen. What is in the video?",
    "Do you recognise what moves across the screen?", "Say what is shown in this short film.",
    "Could you tell me what the animation shows?", "Please name the object in this clip.",
    "Which thing can be seen in this footage?",
)  # fmt: skip
DESCRIBE_CLIP = (
    "Describe this video.", "Describe the clip.", "What happens in this video?", "Give me a caption for this clip.",
    "Tell me what goes on here.", "Caption this video, please.", "Explain what you see in the film.",
    "Describe what happens here.", "Describe this short film in a sentence.", "Put this video into words.",
    "What can you tell me about this clip?", "Say what is shown and how it moves.", "Write a caption for the video.",
    "Sum up the clip in one sentence.", "I can't watch this, can you describe it for me?",
    "What is happening in the animation?", "Give me a full description of this footage.", "describe the vid pls",
    "Tell me what you see and what it does.",
)  # fmt: skip
ASK_MOTION = (
    "How does it move?", "What does it do?", "Which way does it go?", "What is the movement?", "how is it moving",
    "Describe the movement.", "In which way does it move?", "What kind of motion is this?",
    "Tell me how the thing moves.", "what's it doing", "How would you call this movement?",
    "What is it doing in the video?", "Where is it going, or what is it doing?", "Which motion do you see?",
)  # fmt: skip
AGAIN_CLIP = (
    "Make this again", "Film the same thing", "Make me another clip like this", "Animate this again",
    "Show me one like this", "Make a video like this", "Now you film it", "Animate what is shown here",
    "Give me your own version of this clip", "Do this video over", "I want the same clip again", "Copy this film",
    "Could you film this once more", "Recreate this video", "Make one more video of this thing",
    "Try to animate this yourself",
)  # fmt: skip
CHANGE_MOTION = (
    "now {m}", "Make it {m}.", "The same, but {m}.", "Can I have it {m}?", "I want it {m}.", "and {m}?",
    "instead, {m}", "This time {m}, please.", "Could it be {m} instead?", "I'd rather see it {m}.",
    "Let it be {m} now.", "Keep everything, but let me see it {m}.", "What would it look like {m}?",
    "Change the movement: {m}.", "do it again but {m}", "Show it {m}.",
)  # fmt: skip

ASK_SOUND = (
    "let me hear", "play", "play me", "make the sound of", "I want to hear", "play the sound of", "can I hear",
    "could you play", "generate the sound of", "create an audio clip of", "give me the sound of", "please play",
    "I would like to listen to", "let me listen to", "make a sound like", "produce audio of", "record", "now play",
    "I'd like to hear", "imitate", "show me how it sounds:", "sing or play", "I need the sound of",
    "make it sound like", "our ears are waiting for", "I wanna hear", "let me have a listen to", "would you play",
    "put on the sound of", "I'm curious to hear", "give me a recording of", "make a recording of",
    "play a few seconds of", "do an impression of", "make audio with", "we want to hear",
    "come up with a sound clip of", "please generate a sound of", "can you produce the noise of",
    "get me the audio of", "send me a sound file of", "without any comment, play", "it would be lovely to hear",
    "would you mind playing", "turn up the speakers and play", "kindly let me hear", "create a sound effect of",
    "I am all ears for", "I'd love to listen to", "perform",
)  # fmt: skip
WHOLE_SOUND = (
    "sound: {x}", "audio of {x}", "{x}, as a sound", "the sound of {x}", "{x} - can I hear that?",
    "an audio clip: {x}", "What does it sound like: {x}? Play it.", "I have never heard {x}. Play it.",
    "For my film I need the sound of {x}.", "Hello! Let me hear {x}.", "generate audio {x}", "pls play {x}",
    "My son wants to hear {x}.", "a recording of {x}, please", "Close your eyes and listen: {x}. Can you do that?",
    "Make some noise: {x}", "I want to know how it sounds: {x}.", "Surprise my ears with {x}!", "sound effect of {x}",
    "sound effect: {x}", "{X}. As audio, please.", "{X}, but only the sound of it, no picture.",
    "{X}: let me hear that, no explanation.", "{x} sound pls", "can u play {x}", "audio pls: {x}", "lemme hear {x}",
    "hey got a sound of {x}?", "need a sfx, {x}, thx", "plya {x} for me",
    "I don't want to see it, I want to hear it: {x}.", "No picture needed, only the sound: {x}.",
    "Not a video, just audio of {x}, please.", "No words, just the sound. {X}.", "Answer with a sound only: {x}",
    "Ears open: {x}!", "Turn up the volume, I want to hear {x}.", "My speakers are on. Play {x}.",
    "I have put on my headphones and am ready for {x}.",
    "I have a picture of a house by the lake, and now I need the sound of {x} to go with it.",
    "My sister plays the flute and my dad has a drum, but what I'd like to hear now is {x}.",
    "We were looking at birds in the park, and my daughter asked to hear {x}. Can you play it?",
    "I am a teacher, and my class has to guess sounds. The first sound: {x}.",
    "As a radio producer I need a jingle. Use {x}.",
    "I am making an audio book and need the following noise in chapter two: {x}.",
    "You are a foley artist. Make the sound of {x}.", "You are a musician on a stage. The audience wants to hear {x}.",
    "Act as a sound designer and give me the audio of {x}.", "Task: produce audio. Content: {x}.",
    "Input: {x}. Output: a sound.", "Read the following description and make a sound from it: {x}",
    "Let it sound through the room: {x}.", "I would like to know by ear what {x} is like. Play it for me.",
    "I wonder how {x} sounds. Can you let me hear it?", "Is there any way for me to listen to {x}?",
    "Do you happen to have a recording of {x}?", "Would you be able to play {x}? I'd be very grateful.",
    "May I hear something? I'd like {x}.", "How does {x} sound? Don't explain it, play it.",
    "I wish I could hear {x} right now.", "Nothing would please my ears more than {x}.",
    "It has been years since I last heard {x}. Play it for me, please.",
    "My grandmother can't see well, but she would enjoy listening to {x}.",
    "For the game that I am programming, each button needs a sound. This one gets {x}.",
    "After the picture of the mountain I now want something to listen to: {x}.",
    "Music, please! Or noise, I don't mind: {x}.", "Good morning! Would you please send me an audio file with {x}?",
    "Sorry for asking again, but I still need the sound of {x}.",
    "Dear assistant, kindly create a recording of {x}. Many thanks.", "On tape, please: {x}",
    "The recording should contain {x}.", "A few seconds of audio: {x}.", "Ringtone wanted: {x}", "alarm sound: {x}",
)  # fmt: skip
NAME_SOUND = (
    "What is this?", "What do you hear?", "What is that sound?", "What makes this sound?", "Name this sound.",
    "Which instrument or thing is this?", "What am I listening to?", "Tell me what you hear.", "what's that noise",
    "Do you recognise this sound?", "Who or what is making this noise?", "", "Any idea what this sound is?",
    "What sound is this?", "Can you name what you hear?", "What could that noise be?", "Guess what makes this noise.",
    "Listen to this. What is it?", "Listen closely: what do you hear?", "what am i hearing", "whats that sound",
    "What is playing here?", "What was recorded here?", "Where does this noise come from?",
    "Which instrument do you hear, or is it something else?", "What is the source of this sound?",
    "Identify this sound, please.", "Can you tell by ear what this is?", "In one word, what do you hear?",
    "I am deaf. What is in this recording?", "I heard this last night. What was it?",
    "My phone recorded this, what is it?", "Could you tell me what makes this sound?",
    "What can be heard in this recording?", "What does this audio clip contain?",
    "Is this an instrument, an animal or a thing, and which one?", "Put a name to this sound.",
    "Who or what do you hear?", "Recognise that noise?", "Say what this sounds like to you.",
)  # fmt: skip
DESCRIBE_SOUND = (
    "Describe this sound.", "Describe what you hear.", "Give me a caption for this sound.",
    "What happens in this recording?", "Tell me everything about this sound.", "Caption this audio, please.",
    "Describe the recording in detail.", "Put this sound into words.", "What can you tell me about this recording?",
    "Describe this audio in a sentence.", "Describe what is played here.", "Give me all the details of this sound.",
    "What is going on in this audio?", "Write a caption for the recording.", "Sum up in a sentence what you hear.",
    "I can't hear this, can you describe it for me?", "describe the audio pls",
    "Say what makes the sound, and what it plays or does.", "Which caption would fit this sound?",
)  # fmt: skip
AGAIN_SOUND = (
    "Play this again", "Make the same sound", "Play me something like this", "Make a sound like this one",
    "Repeat this sound", "Now you play it", "Let me hear that once more", "Copy this sound",
    "I want the same sound again", "Can you reproduce what you hear", "Play that back to me",
    "Give me your own version of this sound", "Recreate this recording", "Try to make this noise yourself",
    "Imitate what you hear",
)  # fmt: skip
CHANGE_SOUND = (
    "now {x}", "Now play {x} instead.", "And now {x}?", "I would rather hear {x}.", "Change it to {x}.", "Make it {x}",
    "The same with {x}.", "How about {x}?", "This time {x}, please.", "Could it be {x} instead?", "Swap it for {x}.",
    "Actually, I want to hear {x}.", "No, I meant {x}.", "not that, {x} please",
    "And what would it sound like with {x}?", "Let me hear {x} in its place.", "Next sound: {x}.",
    "One more, but {x} this time.",
)  # fmt: skip

INTO = {
    "image": (
        "Draw it", "Draw what you hear", "Draw what this is", "Show me a picture of that", "Now a picture of it",
        "Paint this", "Make a picture of it", "What does that look like? Draw it.", "Show me what makes this",
        "Turn this into a picture", "Sketch it for me", "I want to see it in a picture", "Make an image of this",
        "Could you draw this for me", "Now as a drawing, please", "What would a picture of it be like? Make one",
        "Show me a still picture of it", "Paint what you perceive here", "And a drawing to go with it, please",
        "Give me an illustration of the same thing", "Picture of that?", "an image of it pls", "Put it on paper",
        "Can I have that as an image", "Let me see it as a picture", "I'd love a painting of this",
    ),
    "video": (
        "Make it move", "Animate this", "Make a video of it", "Film it", "Turn this into a clip",
        "Now a video of that", "Show it moving", "Bring it to life", "Make a clip of what this is",
        "I want to see this in motion", "Could you animate it for me", "Now as a video, please",
        "Let me watch it in a short film", "Make an animation of the same thing", "Can I have that as a clip",
        "Give me a moving version of it", "Put it in motion", "clip of that pls",
        "How would it look in a movie? Make one", "Do the same as an animation", "Make a gif of it",
        "And a video to go with it, please", "Let me watch a clip of that", "I'd love a little film of this",
        "Shoot a video of the same thing",
    ),
    "audio": (
        "What does this sound like?", "Let me hear it", "Play its sound", "Make the sound of this",
        "And how does it sound?", "Now let me hear that", "Turn this into sound", "What would I hear?",
        "Play what you see", "I want to hear what it sounds like", "Could you play me its sound",
        "Now as a sound, please", "What noise does it make? Play it", "Give me the sound that goes with it",
        "Can I have that as audio", "Let me listen to it", "sound of that pls", "Make an audio clip of the same thing",
        "And the sound to go with it, please", "Play me the noise of this thing", "Make it heard",
        "I'd love to hear this", "Produce the sound of it", "How does that sound? Let me hear",
        "Do the same as a recording",
    ),
}  # fmt: skip
"""Output modality -> requests to make it of what was shown or made before."""
INTO_FROM = {
    ("audio", "image"): (
        "Draw what makes this sound", "Which thing sounds like that? Draw it", "Paint the source of this recording",
        "A picture of what I am hearing, please", "Illustrate this recording", "I hear this. What does it look like?",
        "Turn the audio into an image", "Guess what this is and draw it", "Make a drawing from this sound",
        "draw the sound", "What could be making this? Show me a picture", "From this noise, make a picture",
        "Close your eyes, listen, and draw what comes to mind", "Let me see the thing that I hear",
        "Picture the thing in this recording", "audio to image", "An illustration for this sound effect, please",
        "Hear this? Sketch whatever it is", "I recorded this outside. Show me what it was, as a picture",
    ),
    ("audio", "video"): (
        "Make a video of what makes this sound", "Animate the thing that I hear", "A clip of the source of this noise",
        "Turn the recording into a video", "Which thing sounds like that? Show it moving", "audio to video",
        "Give this recording a moving picture", "I hear this. Let me watch it move", "From this sound, make a clip",
        "Make an animation for this sound effect", "Show me in a clip what is making this", "Bring this noise to life",
        "Listen to this and animate it", "What is it that I hear? Show me a short video of it",
        "A short film of the thing in this recording, please", "video of whatever makes that noise",
    ),
    ("image", "audio"): (
        "Play the sound of the thing in the picture", "What does the thing in this picture sound like?",
        "Let me hear what I see here", "Turn the image into sound", "image to audio", "Make this picture audible",
        "Which sound belongs to this picture? Play it", "I see it, now I want to hear it", "Add sound to this picture",
        "If this picture could make a noise, which would it be?", "Sound effect for this drawing, please",
        "Make the noise of what is drawn here", "Give this icon a sound", "What would it sound like? Let me hear",
        "Look at this and play its sound", "The sound of this thing, please", "play the thing in the image",
        "I want to hear the thing that I am showing you", "Make a recording of what you see in this picture",
    ),
    ("image", "video"): (
        "Make this picture move", "Animate the drawing", "Turn the image into a clip", "image to video",
        "Make a short video from this picture", "Show the thing in this picture in motion",
        "Let the thing in the picture move", "A clip of what is drawn here, please",
        "I want to watch this picture move",
        "Look at this and make a film of it", "Bring the drawing to life", "animate the pic",
        "From this still, make a clip", "Give me an animation of the thing in the image",
    ),
    ("video", "image"): (
        "Draw what the clip shows", "Make a drawing of the thing in this video",
        "A single picture of it, without motion",
        "Turn the clip into a picture", "video to image", "Show me the same as a still picture",
        "Paint the thing from the video", "Freeze this and draw it", "I want a photo of what moves in this clip",
        "Look at this clip and sketch the thing", "An illustration of what is filmed here, please",
        "Stop the motion: just one picture of it", "make a pic of what is in the clip",
        "A poster for this video: draw the thing in it", "What is in the clip? Draw it",
    ),
    ("video", "audio"): (
        "Play the sound of what the clip shows", "Give the video its sound", "Turn the clip into sound",
        "video to audio", "Which sound belongs to this clip? Play it", "Make the noise of the thing in the video",
        "Let me hear what is filmed here", "The video has no sound track. Make one", "Dub this clip",
        "What would I hear if I stood there? Let me hear it", "Look at this clip and make its sound",
        "Sound for this video, please", "play what the thing in the clip sounds like", "I watch it, now let me hear it",
    ),
}  # fmt: skip
"""(given modality, output modality) -> requests that speak of the medium that is given."""
IN_NOUNS = {
    "image": ("a picture of {}", "an image with {}", "a drawing of {}", "a sketch of {}", "an illustration of {}"),
    "video": ("a clip of {}", "a video of {}", "a short film of {}", "an animation of {}"),
    "audio": ("the sound of {}", "a recording of {}", "an audio clip of {}", "the noise of {}"),
}  # fmt: skip
"""Output modality -> what a thing is asked for as."""
NOUNS_JOINED = (
    (
        "I would like {0} plus {1}.", "Give me {0} and {1}.", "{0}, then {1}, please",
        "For my lesson I need {0} and {1}.",
        "Make me {0} as well as {1}.", "Two things: {0}, {1}.", "{0} and {1}", "Could I have {0} and also {1}?",
        "Please produce {0} and, after it, {1}.", "{0} first, and {1} second", "I am after {0} and {1}.",
        "Send me {0} along with {1}.",
    ),
    (
        "I would like {0}, {1} and {2}.", "Give me {0}, then {1}, then {2}.", "{0}, {1}, {2}, please",
        "Three things: {0}, {1}, {2}.", "For my lesson I need {0}, {1} and {2}.", "Make {0}, {1} and finally {2}.",
        "First {0}, second {1}, third {2}", "Could I have {0}, {1} and also {2}?",
    ),
)  # fmt: skip
"""Two or three nouns in a row."""
TURNED_ROUND = (
    "{1}, but first {0}", "{1}. Before that, {0}", "{1}, only after this: {0}", "{1} - but {0} comes first",
    "In the end {1}, to begin with {0}", "{1}; however, start with this: {0}", "Do not {1} before you {0}",
)  # fmt: skip
"""Two requests of which the second is to be done first."""
ONE_THING = {
    "image": (
        "draw it", "show it in a picture", "make a picture of it", "sketch it", "paint it",
        "show me what it looks like",
    ),
    "video": ("animate it", "film it", "make a clip of it", "show it moving", "make a video of it", "let it move"),
    "audio": (
        "let me hear it", "play its sound", "play it", "make its noise", "let me hear what it sounds like",
        "make the sound that it makes",
    ),
}  # fmt: skip
"""Output modality -> requests about the thing that was just named."""
ONE_THING_WHOLE = (
    "{x} in every way you can: {m}", "Tell me all about {x} with {m}", "{m}, all of {x}", "{X}: {m}",
    "My child has never met {x}. Make {m}", "I want {x} as {m}", "Introduce {x} to me: {m}", "Make {m} of {x}",
)  # fmt: skip
"""{m}: the kinds of media, in order."""
KINDS_OF = {
    "image": ("a picture", "an image", "a drawing"),
    "video": ("a clip", "a video", "an animation"),
    "audio": ("a sound", "a recording", "some audio"),
}
