import sys,json,re
sys.path.insert(0,'/work/plan'); import nv
OUT='/work/main/.carry/k/'
PHASES=['wait x','qkv','wait qkv','attention','wait attended','o','wait middle','gate up','wait gated','down']
def instrument(src):
    src=src.replace('extern __shared__','#define TICK(i) { long long now = clock64(); spent[i] += now - last; last = now; }\nextern __shared__',1)
    m='  for (int layer = 0; layer < LAYERS; layer++) {\n    u32* const words'
    assert m in src
    src=src.replace(m,'  u32 spent[10] = {}; long long last = clock64();\n'+m)
    i=src.index('u32 spent[10]'); head,body=src[:i],src[i:]
    def after(t,n):
        nonlocal body
        assert body.count(t)==1,(t,body.count(t)); body=body.replace(t,t+f' TICK({n})')
    def before(t,n):
        nonlocal body
        assert body.count(t)==1,(t,body.count(t)); body=body.replace(t,f'TICK({n})\n'+t)
    after('input_norm + layer * HIDDEN);',0)
    before('    // ---- attention of',1)
    before('      const int slot =',2)
    before('    // ---- the projection',3)
    after('words + MAIL_LSE, contexts);',4)
    body=body.replace('    else w.receive_attended(words + MAIL_PART, words + MAIL_LSE, contexts); TICK(4)','    else w.receive_attended(words + MAIL_PART, words + MAIL_LSE, contexts);\n    TICK(4)')
    before('    // ---- gate and up',5)
    after('post_norm + layer * HIDDEN);',6)
    before('    // ---- down,',7)
    after('words + MAIL_GATED, nullptr);',8)
    k=body.rindex('    });\n  }\n}'); body=body[:k]+'    });\n    TICK(9)\n  }\n  if (thread == 0) for (int i = 0; i < 10; i++) mail[LAYERS * MAIL_WORDS + block * 16 + i] = spent[i];\n}\n'
    return head+body
V=[]
def add(name,shape,B,ctx=400,check=(),prof=False,edit=None,part=None,P=40,W=8,**kw):
    L,D,N,K,H,F=sh=nv.SH[shape]
    qk=0 if shape in('1B','0.5B') else 1; bias=int(shape=='0.5B')
    d=nv.defs(B,*sh,qk=qk,bias=bias,P=P,W=W,**kw)
    if part: d['LEAST_PART']=part
    src=nv.source(d)
    if edit: src=edit(src)
    if prof: src=instrument(src)
    f=re.sub(r'\W','_',name)+'.ptx'; open(OUT+f,'w').write(nv.ptx(src))
    V.append(dict(name=name,file=f,shape=sh,B=B,ctx=ctx,check=list(check),mail=sh[0]*nv.mail_words(d)+16*d['BLOCKS'],blocks=d['BLOCKS'],qk=qk,bias=bias,prof=PHASES if prof else None,P=d['PAGES'],W=d['TABLE']))
def save(): json.dump(V,open(OUT+'variants.json','w'))
