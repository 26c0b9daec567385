"""Tells courtesies in other languages than the prompt's (request speed, microseconds).

    "Bonjour, pourriez-vous m'aider ? | What part of the cell makes energy? | Merci beaucoup."   →   the middle

A sentence speaks to the assistant in another language when it has one of that language's words for asking, thanking, questions or
answers, and no more English function words than others. It is framing only where what is left is not in that language too. Must
not know: embeddings, where sentences end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# Asking, thanking, greeting, question, answer, help, problem: by language, without the words that English has too.
_ADDRESS_TEXT = """
    bitte danke vielen dank hallo guten grüße beantworte beantworten beantwortest frage fragen antwort antworten hilfe
    helfen hilf
    aufgabe folgende folgenden folgender erkläre erklären löse lösen könntest könnten voraus freundlichen
    schön schöne gruß jemand bräuchte brauche
    besoin remercie remerciements coucou
    bonjour bonsoir salut merci aider aidez aide répondre répondez réponds réponse voici suivante suivant pourriez
    pouvez peux veuillez
    svp plaît résoudre résous résolvez cordialement avance
    agradezco agradecería agradecer mano necesito preciso precisamos valeu tudo brigado
    hola buenos buenas gracias ayuda ayudar ayudarme ayúdame pregunta siguiente podrías podría puedes puede responde
    responder respuesta
    contesta favor saludos resuelve resolver tarea antemano
    bisogno avrei infinite mille ringrazio
    ciao salve buongiorno buonasera grazie prego aiuto aiutarmi aiutami domanda seguente potresti potrebbe puoi
    rispondi rispondere
    risposta cortesemente risolvi risolvere saluti anticipo
    olá oi obrigado obrigada ajuda ajudar pergunta seguinte poderia pode você responda resposta resolva tarefa desde
    atenciosamente
    hoi hallo goedendag dank bedankt alstublieft alsjeblieft vraag volgende kunt beantwoorden antwoord helpen groeten
    alvast oplossen
    hej hallå tack snälla fråga följande kan du svara svar hjälpa hjälp hälsningar uppgift
    goddag tak venligst spørgsmål følgende besvare hjælpe hjælp hilsen hei takk vennligst spørsmål hjelpe hjelp
    moi hei kiitos ole hyvä kysymys seuraava seuraavaan vastaa voisitko auttaa ystävällisin terveisin
    cześć dzień dobry dziękuję dzięki proszę pytanie następujące odpowiedz odpowiedzieć odpowiedź pomóc pomoc
    pozdrawiam zadanie
    ahoj dobrý děkuji děkuju díky prosím otázku otázka odpověz odpovědět odpověď pomoci pomoc ďakujem úlohu
    szia üdvözlöm köszönöm kérem kérlek kérdés kérdésre válasz válaszolj segíteni segíts
    bună salutări mulțumesc multumesc rog întrebare întrebarea răspunde ajuta ajutor
    merhaba selam teşekkürler teşekkür ederim lütfen soru soruyu soruya cevap cevapla yanıtla yardım yardımcı
    halo terima kasih tolong mohon pertanyaan berikut jawab jawablah bantu bantuan membantu sila soalan
    xin chào cảm ơn vui lòng câu hỏi trả lời giúp làm
    habari asante tafadhali swali jibu nisaidie saidia kumusta salamat pakiusap tanong sagot sagutin tulong
    привет здравствуйте здравствуй добрый пожалуйста спасибо вопрос ответь ответьте ответить ответ помоги помогите
    помочь задачу задача
    благодарю заранее реши решите вітаю дякую будь ласка питання відповідь допоможи здравей благодаря моля въпрос
    γεια καλημέρα παρακαλώ ευχαριστώ ερώτηση απάντησε απαντήστε βοήθεια βοηθήσεις
    مرحبا مرحبًا السلام شكرا شكرًا فضلك رجاء سؤال السؤال التالي أجب الإجابة مساعدة مساعدتي ساعدني سلام لطفا لطفاً
    ممنون متشکرم پرسش کمک
    שלום תודה בבקשה שאלה השאלה תשובה ענה לעזור עזרה
    नमस्ते कृपया धन्यवाद प्रश्न सवाल उत्तर जवाब मदद सहायता निम्नलिखित
"""
ADDRESS = frozenset(_ADDRESS_TEXT.split())
# Scripts that put no spaces between words: parts of words that say the same.
_WRITTEN_TOGETHER = (
    *("你好", "您好", "请", "請", "谢谢", "謝謝", "感谢", "感謝", "问题", "問題", "回答", "帮", "幫", "解答"),
    *("こんにちは", "お願い", "ください", "ありがとう", "質問", "答え", "教えて", "助け"),
    *("안녕", "부탁", "주세요", "감사", "고마", "질문", "답", "도와"),
    *("สวัสดี", "กรุณา", "ช่วย", "ขอบคุณ", "คำถาม", "ตอบ", "ধন্যবাদ", "প্রশ্ন", "নমস্কার", "সাহায্য", "நன்றி", "கேள்வி", "வணக்கம்"),
)
_ENGLISH_TEXT = """
    a about all an and any are as at be but by can could do does for from had has have how i if in into is it its me my no not
    of on one or our out should so than that the their them then there these they this to up was we were what when where which
    who why will with would you your
"""
_ENGLISH = frozenset(_ENGLISH_TEXT.split())
_OTHER_TEXT = """
    der die das den dem ein eine einen und ist nicht ich mir mich du sie wir auf für mit von zu zum zur bei es im um
    wie wenn noch
    le la les des une et est je tu vous nous pas ce cette ces avec pour dans sur qui que au aux moi votre ma mon mes
    el los las unos una y es yo tú usted con para por en del al mi mis su sus que esta este esto qué cómo lo
    il lo gli uno è io tu lei con per di della del nel che questa questo mi una
    o os as um uma e é eu com para por em do da dos das no na que esta este isso me meu minha
    het een en ik jij je u van met voor op dat deze dit niet mijn
    och att är jag du det som på med för en ett min mig og er jeg det som på med til en et min meg
    ja on se en että minä voi w z na się jest nie to i do dla moje mi že je a na se to és az egy nem
    și este cu pe la un o nu ve bir bu ben için da yang dan ini itu saya untuk dengan anda của và là tôi cho này
"""
_OTHER = frozenset(_OTHER_TEXT.split()) - _ENGLISH - {"die", "o", "a", "i", "no", "on", "to", "is", "do", "me", "as", "in", "an"}
# Marks that belong to a letter are no letters themselves, so words end at spaces and marks of punctuation.
_WORD = re.compile(r"[^\s\d!-&(-/:-@\[-`{-~¡¿«»“”…،।؟、。！？：；，]+")
_OTHER_SCRIPT = re.compile(r"[\u0370-\u1fff\u2e80-\ud7ff]")
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")


def speaks_otherwise(sentence: str, words: Sequence[str]) -> bool:
    """Whether the sentence of these words speaks to the assistant in another language than English."""
    if not sentence.isascii():
        if any(part in sentence for part in _WRITTEN_TOGETHER):
            return len(_OTHER_SCRIPT.findall(sentence)) > len(_LATIN.findall(sentence))
        words = _WORD.findall(sentence.lower())
    return not ADDRESS.isdisjoint(words) and num_other(words) >= num_english(words)


def is_english(text: str) -> bool:
    """Whether what is left of a prompt is in a language that framing in others can be told from."""
    if not text.isascii() and len(_OTHER_SCRIPT.findall(text)) > len(_LATIN.findall(text)):
        return False
    words = _WORD.findall(text.lower())
    return num_other(words) <= num_english(words)


def num_english(words: Sequence[str]) -> int:
    """Function words of English."""
    return sum(word in _ENGLISH for word in words)


def num_other(words: Sequence[str]) -> int:
    """Words for speaking to somebody in other languages, and function words of those written in Latin letters."""
    return sum(word in ADDRESS or word in _OTHER for word in words)
